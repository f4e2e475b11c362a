import torch

import cnmix
from cnmix import checkpoint


def test_a_checkpoint_of_a_small_one(imagenet_test, tmp_path):
    imagenet, imagenet_checkpoint = imagenet_test.imagenet, imagenet_test.imagenet_checkpoint
    torch.manual_seed(0)
    model = imagenet.ResNet((1, 1, 1, 1), num_classes=12)
    imagenet_checkpoint.make_checkpoint(tmp_path / "net.ckpt", model, steps=2, batch_size=2, side=32)
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
