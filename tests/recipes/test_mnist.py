import gzip
import re
import struct

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = NAMES
TRAIN = 30
TEST = 20


def idx(values, kind=8, magic=b"\x00\x00"):
    values = np.asarray(values, dtype=np.uint8)
    return magic + bytes([kind, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def dotted(name):
    return name.replace("-idx", ".idx")


def refusal(path, what):
    return f"^{re.escape(str(path))}: .*{re.escape(what)}"


@pytest.fixture(scope="module")
def arrays():
    source = load_digits()
    # 3 x 8 pixels and a border of 2 make 28, and 16 grey levels times 15 stay below 256.
    images = np.kron(source.images[: TRAIN + TEST].astype(np.uint8) * 15, np.ones((1, 3, 3), dtype=np.uint8))
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    labels = source.target[: TRAIN + TEST].astype(np.uint8)
    return {
        TRAIN_IMAGES: images[:TRAIN],
        TRAIN_LABELS: labels[:TRAIN],
        TEST_IMAGES: images[TRAIN:],
        TEST_LABELS: labels[TRAIN:],
    }


@pytest.fixture
def folder(tmp_path, arrays):
    """A folder of the four files, for the malformed cases to spoil one of."""
    for name, values in arrays.items():
        (tmp_path / name).write_bytes(idx(values))
    return tmp_path


def check_loaded(datasets, arrays):
    for dataset, images, labels in zip(
        datasets, (arrays[TRAIN_IMAGES], arrays[TEST_IMAGES]), (arrays[TRAIN_LABELS], arrays[TEST_LABELS]), strict=True
    ):
        assert isinstance(dataset, torch.utils.data.TensorDataset)
        pixels, targets = dataset.tensors
        assert pixels.dtype == torch.float32
        assert pixels.shape == (len(images), 1, 28, 28)
        assert targets.dtype == torch.int64
        assert targets.tolist() == labels.tolist()
        expected = (torch.from_numpy(images.copy()).unsqueeze(1).double() / 255 - 0.1307) / 0.3081
        torch.testing.assert_close(pixels.double(), expected, rtol=1e-6, atol=1e-6)


class TestNet:
    def test_parameters_are_those_of_the_guide(self, mnist):
        shapes = {name: tuple(value.shape) for name, value in mnist.Net().state_dict().items()}
        assert shapes == {
            "conv1.weight": (32, 1, 3, 3),
            "conv1.bias": (32,),
            "conv2.weight": (64, 32, 3, 3),
            "conv2.bias": (64,),
            "fc1.weight": (128, 9216),
            "fc1.bias": (128,),
            "fc2.weight": (10, 128),
            "fc2.bias": (10,),
        }

    def test_order_and_dropouts(self, mnist):
        children = dict(mnist.Net().named_children())
        assert list(children) == ["conv1", "conv2", "dropout1", "dropout2", "fc1", "fc2"]
        assert (type(children["dropout1"]), children["dropout1"].p) == (torch.nn.Dropout2d, 0.25)
        assert (type(children["dropout2"]), children["dropout2"].p) == (torch.nn.Dropout, 0.5)

    def test_forward_is_the_guides(self, mnist):
        torch.manual_seed(0)
        net = mnist.Net().eval()
        images = torch.randn(5, 1, 28, 28)
        x = F.max_pool2d(F.relu(net.conv2(F.relu(net.conv1(images)))), 2)
        expected = F.log_softmax(net.fc2(F.relu(net.fc1(x.flatten(1)))), dim=1)
        output = net(images)
        assert output.shape == (5, 10)
        torch.testing.assert_close(output, expected)
        labels = torch.arange(5)
        torch.testing.assert_close(F.cross_entropy(output, labels), F.nll_loss(output, labels))

    def test_training_drops_whole_channels_then_single_features(self, mnist):
        torch.manual_seed(0)
        net = mnist.Net()
        seen = {}
        net.dropout1.register_forward_hook(lambda module, inputs, output: seen.update(first=(inputs[0], output)))
        net.dropout2.register_forward_hook(lambda module, inputs, output: seen.update(second=(inputs[0], output)))
        net(torch.randn(4, 1, 28, 28)).sum().backward()
        assert all(parameter.grad is not None for parameter in net.parameters())

        before, after = seen["first"]
        assert before.shape == (4, 64, 12, 12)
        kept = after.flatten(2).any(dim=2)
        assert 0 < kept.sum() < kept.numel()
        torch.testing.assert_close(after, before / 0.75 * kept[:, :, None, None])
        before, after = seen["second"]
        assert before.shape == (4, 128)
        assert 0 < ((before > 0) & (after == 0)).sum() < (before > 0).sum()


class TestReadIdx:
    @pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (2, 1, 3, 2, 2), (0,), (0, 4)])
    @pytest.mark.parametrize("zipped", [False, True])
    def test_round_trip(self, mnist, tmp_path, shape, zipped):
        values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        path = tmp_path / "values"
        path.write_bytes(gzip.compress(idx(values)) if zipped else idx(values))
        result = mnist.read_idx(path)
        assert result.dtype == torch.uint8
        assert result.shape == shape
        assert np.array_equal(result.numpy(), values)

    def test_path_may_be_a_string_and_values_are_writable(self, mnist, tmp_path):
        path = tmp_path / "values"
        path.write_bytes(idx([1, 2, 3]))
        result = mnist.read_idx(str(path))
        result += 1
        assert result.tolist() == [2, 3, 4]
        assert mnist.read_idx(path).tolist() == [1, 2, 3]

    def test_missing_file(self, mnist, tmp_path):
        with pytest.raises(FileNotFoundError, match="absent"):
            mnist.read_idx(tmp_path / "absent")

    @pytest.mark.parametrize(
        ("data", "what"),
        [
            (b"", "truncated IDX header: expected at least 4 bytes, got 0"),
            (b"\x00\x00\x08", "truncated IDX header: expected at least 4 bytes, got 3"),
            (b"<!DOCTYPE html>", "not an IDX file: wrong magic number 0x3c21444f"),
            (idx([1], magic=b"\x00\x01"), "wrong magic number 0x00010801"),
            (idx([1], kind=0x0D), "IDX data type 0x0d, expected 0x08 (unsigned byte)"),
            (b"\x00\x00\x08\x00\x01", "IDX dimension count 0"),
            (b"\x00\x00\x08\x03" + bytes(8), "truncated IDX header: 3 dimensions need 16 bytes, the file has 12"),
            (idx([[1, 2], [3, 4]])[:-1], "truncated data: shape 2 x 2 needs 4 bytes after the header, the file has 3"),
            (idx([[1, 2]])[:-2], "truncated data: shape 1 x 2 needs 2 bytes after the header, the file has 0"),
            (idx([1, 2]) + b"\n", "trailing bytes after the data: shape 2 needs 2 bytes after the header"),
            (
                b"\x00\x00\x08\x04" + struct.pack(">4I", 0, 2**32 - 1, 2**32 - 1, 2**32 - 1),
                "no tensor can have the shape 0 x 4294967295",
            ),
        ],
    )
    @pytest.mark.parametrize("zipped", [False, True])
    def test_malformed(self, mnist, tmp_path, data, what, zipped):
        path = tmp_path / "values"
        path.write_bytes(gzip.compress(data) if zipped else data)
        with pytest.raises(ValueError, match=refusal(path, what)):
            mnist.read_idx(path)

    @pytest.mark.parametrize("case", ["cut short", "header only", "bad checksum", "bad stream", "garbage behind"])
    def test_corrupt_gzip(self, mnist, tmp_path, case):
        whole = gzip.compress(idx(np.arange(200)))
        data = {
            "cut short": whole[:-20],
            "header only": whole[:2],
            "bad checksum": whole[:-8] + bytes(byte ^ 0xFF for byte in whole[-8:-4]) + whole[-4:],
            "bad stream": whole[:10] + b"\xff" * 20 + whole[30:],
            "garbage behind": whole + b"garbage",
        }[case]
        path = tmp_path / "values.gz"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=refusal(path, "corrupt gzip data")):
            mnist.read_idx(path)


class TestLoad:
    @pytest.mark.parametrize("place", ["", "raw", "MNIST/raw"])
    @pytest.mark.parametrize("spell", [str, dotted])
    @pytest.mark.parametrize("zipped", [False, True])
    def test_places_and_spellings(self, mnist, tmp_path, arrays, place, spell, zipped):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        for name, values in arrays.items():
            data = gzip.compress(idx(values)) if zipped else idx(values)
            (tmp_path / place / (spell(name) + ".gz" * zipped)).write_bytes(data)
        check_loaded(mnist.load(str(tmp_path)), arrays)

    def test_gzip_is_told_by_content(self, mnist, tmp_path, arrays):
        for name, zipped in zip(NAMES, (True, True, False, False), strict=True):
            data = idx(arrays[name])
            if zipped:
                (tmp_path / name).write_bytes(gzip.compress(data))
            else:
                (tmp_path / f"{name}.gz").write_bytes(data)
        check_loaded(mnist.load(tmp_path), arrays)

    def test_folder_of_the_same_name_is_not_a_file(self, mnist, tmp_path, arrays):
        for name, values in arrays.items():
            (tmp_path / name).mkdir()
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
        check_loaded(mnist.load(tmp_path), arrays)

    def test_default_folder_is_relative(self, mnist, tmp_path, arrays, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match=re.escape(f"Put them into {tmp_path / 'data' / 'mnist'},")):
            mnist.load()
        (tmp_path / "data" / "mnist").mkdir(parents=True)
        for name, values in arrays.items():
            (tmp_path / "data" / "mnist" / name).write_bytes(idx(values))
        check_loaded(mnist.load(), arrays)

    def test_home_folder(self, mnist, folder, arrays, monkeypatch):
        monkeypatch.setenv("HOME", str(folder))
        check_loaded(mnist.load("~"), arrays)

    def test_normalisation(self, mnist, folder, arrays):
        train, _ = mnist.load(folder, mean=0, std=1)
        assert torch.equal(train.tensors[0].mul(255).round().byte().squeeze(1), torch.tensor(arrays[TRAIN_IMAGES]))
        train, _ = mnist.load(folder, mean=0.5, std=0.25)
        assert train.tensors[0].min() == -2

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"mean": float("nan")}, "mean must be finite, got nan"),
            ({"mean": float("inf")}, "mean must be finite, got inf"),
            ({"std": 0.0}, "std must be finite and above 0, got 0.0"),
            ({"std": -1.0}, "got -1.0"),
            ({"std": float("nan")}, "got nan"),
        ],
    )
    def test_refused_normalisation(self, mnist, folder, arguments, message):
        with pytest.raises(ValueError, match=message):
            mnist.load(folder, **arguments)

    @pytest.mark.parametrize("missing", [NAMES, (TRAIN_LABELS,), (TRAIN_IMAGES, TEST_LABELS)])
    def test_missing_files(self, mnist, folder, missing):
        for name in missing:
            (folder / name).unlink()
        with pytest.raises(FileNotFoundError) as caught:
            mnist.load(folder)
        message = str(caught.value)
        assert f"missing {len(missing)} of 4 files: {', '.join(missing)}. " in message
        assert f"Put them into {folder}, unpacked or gzipped (.gz)" in message
        assert f"Looked in {folder}, {folder / 'raw'}, {folder / 'MNIST' / 'raw'}," in message
        assert dotted(missing[0]) in message
        for name in set(NAMES) - set(missing):
            assert name not in message

    def test_missing_folder(self, mnist, tmp_path):
        with pytest.raises(FileNotFoundError, match="missing 4 of 4 files"):
            mnist.load(tmp_path / "absent")

    @pytest.mark.parametrize(
        ("name", "values", "what"),
        [
            (TRAIN_IMAGES, np.zeros(TRAIN), "IDX dimension count 1, expected 3 for images"),
            (TEST_IMAGES, np.zeros((TEST, 1, 28, 28)), "IDX dimension count 4, expected 3 for images"),
            (TRAIN_LABELS, np.zeros((TRAIN, 1)), "IDX dimension count 2, expected 1 for labels"),
            (TRAIN_IMAGES, np.zeros((TRAIN, 32, 28)), "images of 32 x 28 pixels, expected 28 x 28"),
            (TEST_IMAGES, np.zeros((TEST, 28, 27)), "images of 28 x 27 pixels, expected 28 x 28"),
            (TRAIN_LABELS, np.zeros(TRAIN - 1), f"{TRAIN - 1} labels, but "),
            (TEST_LABELS, np.zeros(TEST + 1), f"has {TEST} images"),
            (TEST_LABELS, np.arange(TEST) % 11, "label 10 at index 10, expected 0 to 9"),
            (TRAIN_LABELS, np.full(TRAIN, 255), "label 255 at index 0, expected 0 to 9"),
        ],
    )
    def test_malformed(self, mnist, folder, name, values, what):
        (folder / name).write_bytes(idx(values))
        with pytest.raises(ValueError, match=refusal(folder / name, what)):
            mnist.load(folder)

    def test_no_images(self, mnist, folder):
        (folder / TRAIN_IMAGES).write_bytes(idx(np.zeros((0, 28, 28))))
        (folder / TRAIN_LABELS).write_bytes(idx(np.zeros(0)))
        with pytest.raises(ValueError, match=refusal(folder / TRAIN_IMAGES, "no images")):
            mnist.load(folder)

    def test_malformed_file_is_named_where_it_was_found(self, mnist, folder):
        (folder / TEST_IMAGES).unlink()
        (folder / "raw").mkdir()
        path = folder / "raw" / f"{dotted(TEST_IMAGES)}.gz"
        path.write_bytes(gzip.compress(b"<html>"))
        with pytest.raises(ValueError, match=refusal(path, "not an IDX file")):
            mnist.load(folder)

    def test_network_takes_what_load_gives(self, mnist, folder):
        train, _ = mnist.load(folder)
        torch.manual_seed(0)
        net = mnist.Net()
        images, labels = train.tensors
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        assert loss.isfinite()


class TestUpscaledDigits:
    def test_images(self, mnist):
        train, test = mnist.upscaled_digits()
        for dataset, count in ((train, 1347), (test, 450)):
            images, labels = dataset.tensors
            assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
            assert images.shape == (count, 1, 28, 28)
            assert labels.bincount().min() > count // 11
            pixels = images * 0.3081 + 0.1307
            assert pixels.min() > -1e-6
            assert pixels.max() < 1 + 1e-6
            border = torch.ones(28, 28, dtype=torch.bool)
            border[4:24, 4:24] = False
            torch.testing.assert_close(pixels[:, 0, border], torch.zeros(count, int(border.sum())), atol=1e-6, rtol=0)

    def test_split(self, mnist):
        first, again, other = (mnist.upscaled_digits(0.5, seed)[1].tensors[0] for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
