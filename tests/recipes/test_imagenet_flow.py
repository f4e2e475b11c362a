import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import cnmix.torch_mlu
from cnmix import inference
from cnmix.inference import OfflineModel

SIDE = 32


@pytest.fixture
def small(imagenet_test, monkeypatch, tmp_path):
    """Networks and images that are small, with files in a folder that is the working directory."""
    networks = imagenet_test.imagenet
    parts = ((8,), (16,), (16,), (16,), (16,))
    drawn = networks.images

    def vgg(classes=10):
        model = networks.VGG(parts, classes)
        model.classifier = nn.Sequential(nn.Linear(49 * 16, 64), nn.ReLU(), nn.Linear(64, classes))
        return model

    monkeypatch.setattr(networks, "SIDE", SIDE)
    monkeypatch.setattr(networks, "resnet50", lambda classes=10: networks.ResNet((1, 1, 1, 1), classes))
    monkeypatch.setattr(networks, "vgg19", vgg)
    monkeypatch.setattr(networks, "images", lambda count, seed=0, side=SIDE: drawn(count, seed, SIDE))
    monkeypatch.setattr(imagenet_test.imagenet_checkpoint, "IMAGES", 64)
    monkeypatch.chdir(tmp_path)
    return imagenet_test


@pytest.fixture
def run(small, capsys):
    def run(line):
        run.logits = small.run(small.parse(line.split()))
        return dict(part.split(": ", 1) for part in capsys.readouterr().out.splitlines())

    return run


@pytest.fixture
def card():
    cnmix.torch_mlu.install(cards=1, strict=False, card_name="MLU370")
    yield
    cnmix.torch_mlu.install(cards=0, strict=False, card_name="MLU370")


def save_random(small, network):
    torch.manual_seed(0)
    torch.save(getattr(small.imagenet, network)().state_dict(), "net.pth")
    return f"--network {network} --model_path net.pth"


@pytest.mark.usefixtures("card")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("network", "mode", "half"), [("resnet50", 1, 1), ("resnet50", 0, 0), ("vgg19", 2, 1)])
def test_to_the_card(small, run, network, mode, half):
    given = f"{save_random(small, network)} --quantized_model_path . --quantized_mode {mode} --image_number 4"
    if mode > 0:
        name = ("", "int8", "int16")[mode]
        assert run(f"{given} --quantization true") == {"quantized": f"{network}_{name}.pth"}
    measured = "--batch_size 2 --compute_accuracy true --run_mode true"
    on_card = f"{given} {measured} --mlu true --half_input {half}"
    assert list(run(on_card)) == ["Accuracy", "Throughput(fps)", "Latency(ms)"]
    eager = run.logits
    assert eager.shape == (4, 10)
    printed = run(f"{on_card} --jit true --save_offline_model true")
    assert printed["offline model"] == f"{network}.cambricon"
    fused = run.logits
    printed = run(f"--offline {network}.cambricon --quantized_mode {mode} --image_number 4 {measured}")
    assert list(printed) == ["Accuracy", "Throughput(fps)", "Latency(ms)"]
    assert torch.equal(fused, run.logits)
    assert torch.equal(eager, fused)
    dtype = torch.float16 if half or mode == 0 else torch.float32
    assert OfflineModel(f"{network}.cambricon").inputs[0][1:] == ((2, 3, SIDE, SIDE), dtype)


@pytest.mark.parametrize("network", ["resnet50", "vgg19"])
def test_makes_a_checkpoint_where_there_is_none(small, run, network):
    line = f"--network {network} --image_number 64 --batch_size 16 --compute_accuracy true"
    run(line.replace("64", "16"))
    printed = run(line)
    assert list(printed) == ["Accuracy"]
    assert float(printed["Accuracy"]) > 0.3  # of ten classes
    saved = cnmix.checkpoint.load(f"runs/imagenet/{network}.pt")
    model = inference.load(getattr(small.imagenet, network)(), saved)
    x, _ = small.imagenet.images(64, seed=small.TEST_SEED)
    with torch.no_grad():
        agree = (model(x).argmax(1) == run.logits.argmax(1)).float().mean()
    assert agree > 0.9


class TestFolder:
    @pytest.fixture
    def folder(self, tmp_path):
        generator = np.random.default_rng(0)
        for name, size in (("n02", (60, 40)), ("n01", (40, 60)), ("n03", (32, 32))):
            for number in range(2):
                file = tmp_path / "data" / "val" / name / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file)
        (tmp_path / "data" / "val" / "n00").mkdir()
        return tmp_path / "data"

    def test_images(self, small, folder):
        found = small.imagenet.find_images(folder / "val")
        assert [(file.parent.name, number) for file, number in found] == [
            (name, number) for number, name in ((1, "n01"), (2, "n02"), (3, "n03")) for _ in range(2)
        ]
        Image.new("RGB", (100, 70), (255, 0, 128)).save(folder / "red.png")
        x = small.imagenet.read_image(folder / "red.png", side=56)
        assert x.shape == (3, 56, 56)
        expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (128 / 255 - 0.406) / 0.225]
        torch.testing.assert_close(x.mean((1, 2)), torch.tensor(expected))

    def test_the_centre(self, small, folder):
        pixels = np.zeros((64, 128, 3), dtype=np.uint8)
        pixels[:, 64:] = 255
        Image.fromarray(pixels).save(folder / "half.png")
        x = small.imagenet.read_image(folder / "half.png", side=56)  # the shorter side is 64 as it is
        assert (x[0, :, :28] < 0).all()
        assert (x[0, :, 28:] > 0).all()

    def test_run(self, small, run, folder):
        given = save_random(small, "resnet50")
        run(f"{given} --data {folder} --image_number 3 --compute_accuracy true")
        assert run.logits.shape == (3, 10)

    def test_refused(self, small, run, folder):
        given = save_random(small, "vgg19")
        (folder / "val" / "n01" / "0.png").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"0\.png is damaged, or no image"):
            run(f"{given} --data {folder} --image_number 1")
        with pytest.raises(FileNotFoundError, match="val has no images: it needs a folder for each class"):
            run(f"{given} --data {folder / 'val'} --image_number 1")
        with pytest.raises(ValueError, match="has fewer than 8 images"):
            run(f"{given} --data {folder} --image_number 8 --batch_size 8")
        with pytest.raises(ValueError, match=r"net\.pth is no resnet50: Missing key"):
            run("--network resnet50 --model_path net.pth")


@pytest.mark.usefixtures("card")
def test_needs_a_quantized_model(small, run):
    given = save_random(small, "vgg19")
    with pytest.raises(FileNotFoundError, match=r"vgg19_int8\.pth: make it with --quantization true"):
        run(f"{given} --mlu true")
