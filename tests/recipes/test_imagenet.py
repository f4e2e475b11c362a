import pytest
import torch
from torch import nn

import cnmix
from cnmix import checkpoint


@pytest.mark.parametrize(("name", "parameters", "layers"), [("resnet50", 25_557_032, 54), ("vgg19", 143_667_240, 19)])
def test_sizes_as_published(imagenet, name, parameters, layers):
    with torch.device("meta"):
        model = getattr(imagenet, name)()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == layers


def test_torchvisions_keys(imagenet):
    with torch.device("meta"):
        resnet, vgg = imagenet.resnet50().state_dict(), imagenet.vgg19().state_dict()
    assert len(resnet) == 320
    shapes = {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_var": (64,),
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "layer2.0.conv2.weight": (128, 128, 3, 3),
        "layer3.5.bn3.num_batches_tracked": (),
        "layer4.2.conv3.weight": (2048, 512, 1, 1),
        "fc.weight": (1000, 2048),
    }
    assert {name: tuple(resnet[name].shape) for name in shapes} == shapes
    convolutions = (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34)
    names = [*(f"features.{i}" for i in convolutions), *(f"classifier.{i}" for i in (0, 3, 6))]
    assert list(vgg) == [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


def test_images(imagenet):
    x, targets = imagenet.images(20, seed=3, side=16)
    assert x.shape == (20, 3, 16, 16)
    assert targets.unique().numel() > 3
    assert x.mean((1, 2, 3)).abs().max() < 1e-5
    torch.testing.assert_close(x.std((1, 2, 3)), torch.ones(20))
    assert torch.equal(imagenet.images(20, seed=3, side=16)[0], x)


def test_a_checkpoint_of_a_small_one(imagenet, tmp_path):
    torch.manual_seed(0)
    model = imagenet.ResNet((1, 1, 1, 1), num_classes=12)
    imagenet.make_checkpoint(tmp_path / "net.ckpt", model, steps=2, batch_size=2, side=32)
    x, targets = imagenet.images(96, side=32)
    with torch.no_grad():
        assert model(x).shape == (96, 12)
        assert (model(x).argmax(1) == targets).float().mean() > 0.9  # what the last layer was fitted to
    saved = checkpoint.load(tmp_path / "net.ckpt")
    plain = imagenet.ResNet((1, 1, 1, 1), num_classes=12)
    plain.load_state_dict(saved["state_dict"])
    assert torch.equal(plain.fc.weight, model.fc.weight)
    modules = saved["cnmix"]["models"][0]["modules"]
    assert len(modules) == 18
    assert {each["operands"]["input"]["bits"] for each in modules.values()} == {8}
    assert not any(isinstance(module, cnmix.nn.QuantizedModule) for module in model.modules())
