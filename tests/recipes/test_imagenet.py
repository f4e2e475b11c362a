import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn


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


def test_narrow_ones(imagenet):
    resnet, vgg = imagenet.resnet50(10, width=16), imagenet.vgg19(10, width=8, dropout=0.1)
    whole = imagenet.resnet50, imagenet.vgg19
    for model, build, width in zip((resnet, vgg), whole, (16, 8), strict=True):
        with torch.device("meta"):
            expected = {name: each.shape for name, each in build().state_dict().items()}
        assert list(model.state_dict()) == list(expected)
        for name, value in model.state_dict().items():
            outputs = expected[name][:1]
            assert value.shape[:1] == (outputs if outputs in ((), (1000,)) else (outputs[0] * width // 64,)) or (
                outputs == (1000,) and len(value) == 10
            )
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert {module.p for module in vgg.modules() if isinstance(module, nn.Dropout)} == {0.1}
    for build in whole:
        with pytest.raises(ValueError, match="width must be at least 1, got 0"):
            build(10, width=0)


def test_published_weights_at_the_start(imagenet):
    torch.manual_seed(0)
    first = imagenet.VGG(((2,),), 10, features=4096).classifier[0].weight
    assert first.std().item() == pytest.approx(0.01, rel=0.02)


def test_drawn(imagenet):
    train, test = imagenet.drawn(30, 20, side=16, noise=1.0)
    assert [tuple(each.shape) for each in (*train.tensors, *test.tensors)] == [
        (30, 3, 16, 16),
        (30,),
        (20, 3, 16, 16),
        (20,),
    ]
    assert not torch.equal(train.tensors[0][:20], test.tensors[0])
    assert torch.equal(imagenet.drawn(30, 20, side=16, noise=1.0)[0].tensors[0], train.tensors[0])


class TestLoad:
    @pytest.fixture
    def folder(self, tmp_path):
        generator = np.random.default_rng(0)
        for part, name in itertools.product(("train", "val"), ("cat", "dog")):
            place = tmp_path / part / name
            place.mkdir(parents=True)
            for number, size in enumerate(((40, 60, 3), (60, 40), (50, 50, 4))):  # colours, grey, with transparency
                pixels = generator.integers(0, 256, size, dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
            Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(place / "3.JPG")
            (place / "notes.txt").write_text("no image")
        return tmp_path

    def test_images_and_classes(self, imagenet, folder):
        train, test = imagenet.load(folder, side=32, classes=2)
        assert (len(train), len(test)) == (8, 8)
        images, targets = next(iter(torch.utils.data.DataLoader(train, batch_size=8)))
        assert images.dtype == torch.float32
        assert images.shape == (8, 3, 32, 32)
        assert targets.dtype == torch.int64
        assert targets.tolist() == [0] * 4 + [1] * 4
        assert torch.equal(test[0][0], imagenet.read_image(folder / "val" / "cat" / "0.png", 32))

    def test_training_draws_and_evaluation_does_not(self, imagenet, folder):
        train, test = imagenet.load(str(folder), side=32, classes=2)
        torch.manual_seed(0)
        first, second = train[0][0], train[0][0]
        assert not torch.equal(first, second)
        torch.manual_seed(0)
        assert torch.equal(train[0][0], first)
        state = torch.get_rng_state()
        assert torch.equal(test[0][0], test[0][0])
        assert torch.equal(torch.get_rng_state(), state)

    def test_flips_half(self, imagenet, tmp_path):
        pixels = np.zeros((32, 32, 3), dtype=np.uint8)
        pixels[:, 16:] = 255
        Image.fromarray(pixels).save(tmp_path / "half.png")
        torch.manual_seed(0)
        read = [imagenet.read_image(tmp_path / "half.png", 8, augment=True) for _ in range(60)]
        left = sum(bool(x[0, :, 0].mean() > x[0, :, -1].mean()) for x in read)
        right = sum(bool(x[0, :, 0].mean() < x[0, :, -1].mean()) for x in read)
        assert min(left, right) > 15

    @pytest.mark.parametrize("size", [(50, 40), (40, 50), (400, 10), (1, 1)])
    def test_random_parts(self, imagenet, size):
        torch.manual_seed(0)
        for _ in range(100):
            left, top, right, bottom = imagenet.random_part(*size)
            assert 0 <= left < right <= size[0]
            assert 0 <= top < bottom <= size[1]
            if (right - left, bottom - top) != size:
                assert 0.5 < (right - left) / (bottom - top) < 2
                assert 0.07 < (right - left) * (bottom - top) / (size[0] * size[1]) <= 1

    @pytest.mark.parametrize("missing", ["train", "val"])
    def test_missing_images(self, imagenet, folder, missing):
        for file in (folder / missing).rglob("*.*"):
            file.unlink()
        with pytest.raises(FileNotFoundError) as caught:
            imagenet.load(folder, classes=2)
        for part in (f"{folder / missing} has no images", str(folder), "train/<class>/x.jpg and val/<class>/x.jpg"):
            assert part in str(caught.value)

    def test_a_class_without_images(self, imagenet, folder):
        for part in ("train", "val"):
            (folder / part / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match=r"train has no images of empty\. Put the images into"):
            imagenet.load(folder, classes=3)

    def test_missing_folder(self, imagenet, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"absent/train has no images.*data\.args\.folder="):
            imagenet.load(tmp_path / "absent")

    def test_other_classes(self, imagenet, folder):
        with pytest.raises(ValueError, match=r"has 2 classes, and the network tells 1000 apart: give model\.args"):
            imagenet.load(folder)
        (folder / "val" / "dog").rename(folder / "val" / "cow")
        with pytest.raises(ValueError, match="must have the same classes, only one of them has cow, dog"):
            imagenet.load(folder, classes=2)

    def test_damaged(self, imagenet, folder):
        file = folder / "train" / "cat" / "0.png"
        file.write_bytes(b"no image")
        train, _ = imagenet.load(folder, side=32, classes=2)
        with pytest.raises(ValueError, match=r"0\.png is damaged, or no image"):
            train[0]

    def test_too_many_bits(self, imagenet, tmp_path):
        Image.fromarray(np.full((40, 40), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
        with pytest.raises(ValueError, match=r"deep\.png has more than 8 bits in a pixel: convert it to 8"):
            imagenet.read_image(tmp_path / "deep.png", 32)

    def test_a_size_that_no_image_has(self, imagenet, tmp_path, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        Image.new("RGB", (40, 40)).save(tmp_path / "large.png")
        with pytest.raises(ValueError, match=r"large\.png is damaged, or no image: Image size \(1600 pixels\)"):
            imagenet.read_image(tmp_path / "large.png", 32)
