import io

import lmdb
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import cnmix

WORDS = ["Cat", "b4d", "x", "toolong", "na\u00efve", "dog"]
KEPT = ["cat", "b4d", "x", "dog"]


def picture(number, size=(30, 20), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size, (40 * number,) * 3 if mode == "RGB" else 40 * number).save(buffer, "PNG")
    return buffer.getvalue()


def fill_folder(place):
    place.mkdir(parents=True)
    (place / "images").mkdir()
    lines = [f"images/{number}.png {word}" for number, word in enumerate(WORDS)]
    (place / "labels.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
    for number in range(len(WORDS)):
        (place / "images" / f"{number}.png").write_bytes(picture(number))


def fill_lmdb(place):
    place.mkdir(parents=True)
    with lmdb.open(str(place), map_size=1 << 20) as database, database.begin(write=True) as transaction:
        transaction.put(b"num-samples", str(len(WORDS)).encode())
        for number, word in enumerate(WORDS):
            transaction.put(f"image-{number + 1:09d}".encode(), picture(number, mode="L"))
            transaction.put(f"label-{number + 1:09d}".encode(), word.encode())


def text_of(crnn, targets):
    return "".join(crnn.ALPHABET[each - 1] for each in targets.tolist() if each)


class TestCRNN:
    def test_sizes_as_published(self, crnn):
        with torch.device("meta"):
            net = crnn.CRNN()
        convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
        assert [module.out_channels for module in convolutions] == [64, 128, 256, 256, 512, 512, 512]
        assert [module.kernel_size[0] for module in convolutions] == [3] * 6 + [2]
        assert sum(isinstance(module, nn.BatchNorm2d) for module in net.modules()) == 3
        assert (net.lstm.input_size, net.lstm.hidden_size, net.lstm.num_layers) == (512, 256, 2)
        assert net.lstm.bidirectional
        assert net.fc.weight.shape == (37, 512)

    @pytest.mark.parametrize(("width", "steps"), [(100, 26), (48, 13), (33, 9)])
    def test_forward(self, crnn, width, steps):
        net = crnn.CRNN(5, width=2, hidden=3)
        assert net(torch.randn(2, 1, 32, width)).shape == (2, steps, 5)

    def test_every_parameter_learns(self, crnn):
        net = crnn.CRNN(5, width=2, hidden=3)
        crnn.ctc_loss(net(torch.randn(4, 1, 32, 48)), torch.tensor([[1, 2, 0]] * 4)).backward()
        assert all(parameter.grad is not None for parameter in net.parameters())

    @pytest.mark.parametrize("name", ["classes", "width", "hidden"])
    def test_refused(self, crnn, name):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            crnn.CRNN(**{name: 0})


class TestLossAndScore:
    def test_loss_of_one_alignment(self, crnn):
        outputs = torch.randn(1, 2, 4)
        scores = outputs.log_softmax(2)[0]
        torch.testing.assert_close(
            crnn.ctc_loss(outputs, torch.tensor([[3, 1, 0]])), -(scores[0, 3] + scores[1, 1]) / 2
        )

    def test_loss_is_the_mean_over_characters_then_words(self, crnn):
        outputs, targets = torch.randn(2, 6, 4), torch.tensor([[3, 1, 2], [2, 0, 0]])
        single = [crnn.ctc_loss(outputs[i : i + 1], targets[i : i + 1]) for i in range(2)]
        torch.testing.assert_close(crnn.ctc_loss(outputs, targets), sum(single) / 2)

    def test_a_word_that_does_not_fit_counts_nothing(self, crnn):
        outputs = torch.randn(1, 2, 4, requires_grad=True)
        loss = crnn.ctc_loss(outputs, torch.tensor([[1, 1]]))  # needs a blank between the two
        loss.backward()
        assert loss == 0
        assert not outputs.grad.any()

    def test_decoding(self, crnn):
        best = torch.tensor([[0, 1, 1, 0, 1, 2], [2, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0]])
        outputs = F.one_hot(best, 3).float()
        assert crnn.decode(outputs) == [[1, 1, 2], [2], []]
        assert crnn.words_right(outputs, torch.tensor([[1, 1, 2], [2, 0, 0], [1, 0, 0]])) == (2, 3)


@pytest.mark.parametrize("fill", [fill_folder, fill_lmdb])
class TestLoad:
    @pytest.fixture
    def folder(self, tmp_path, fill):
        for part in ("train", "val"):
            fill(tmp_path / part)
        return tmp_path

    def test_words_and_images(self, crnn, folder):
        train, test = crnn.load(folder, width=40, longest=4)
        for dataset in (train, test):
            assert [text_of(crnn, targets) for _, targets in dataset] == KEPT
            images, targets = next(iter(DataLoader(dataset, batch_size=4)))
            assert images.shape == (4, 1, 32, 40)
            assert images.dtype == torch.float32
            torch.testing.assert_close(
                images.mean((1, 2, 3)), torch.tensor([0.0, 40.0, 80.0, 200.0]) / 127.5 - 1, atol=1e-6, rtol=0
            )
            assert targets.shape == (4, 4)
            assert targets.dtype == torch.int64

    def test_in_other_processes(self, crnn, folder):
        train, _ = crnn.load(folder, width=40, longest=4)
        loader = DataLoader(train, batch_size=2, num_workers=1, multiprocessing_context="fork")
        read = torch.cat([images for images, _ in loader])
        assert torch.equal(read, torch.stack([image for image, _ in train]))

    def test_no_word_left(self, crnn, folder):
        with pytest.raises(ValueError, match="has no word of 1 to 4 of the characters 9, among 6"):
            crnn.load(folder, longest=4, alphabet="9", classes=2)

    def test_words_that_are_left_out_are_counted(self, crnn, folder, caplog):
        crnn.load(folder, longest=4)
        assert f"{folder / 'val'}: 2 of 6 words are left out" in caplog.text
        caplog.clear()
        letters = "abcdefghijklmnopqrstuvwxyz4\u00ef"
        assert len(crnn.load(folder, longest=7, alphabet=letters, classes=29)[0]) == 6
        assert not caplog.text


class TestMalformed:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"alphabet": "abc"}, "the alphabet has 3 characters, and the network tells 37 classes apart: give model"),
            ({"alphabet": "Abc", "classes": 4}, "alphabet must be a text of small letters"),
            ({"alphabet": "aba", "classes": 4}, "alphabet must be a text of small letters .* each once, got 'aba'"),
            ({"alphabet": 123, "classes": 4}, "alphabet must be a text"),
            ({"longest": 0}, r"longest must lie in \[1, 26\], the steps of a width of 100, got 0"),
            ({"width": 40, "longest": 12}, r"longest must lie in \[1, 11\], the steps of a width of 40, got 12"),
        ],
    )
    def test_arguments(self, crnn, tmp_path, arguments, message):
        with pytest.raises(ValueError, match=message):
            crnn.load(tmp_path, **arguments)

    def test_bytes_of_another_encoding(self, crnn, tmp_path):
        (tmp_path / "labels.txt").write_bytes("a.png na\u00efve".encode("latin-1"))
        with pytest.raises(ValueError, match=r"labels\.txt is not in UTF-8"):
            crnn.WordImages(tmp_path, 40, 4, "cat")
        (tmp_path / "labels.txt").write_bytes(b"\xef\xbb\xbfa.png cat\r\n")
        (tmp_path / "a.png").write_bytes(picture(1))
        assert crnn.WordImages(tmp_path, 40, 4, "cat")[0][1].tolist() == [1, 2, 3, 0]

    def test_missing(self, crnn, tmp_path):
        fill_folder(tmp_path / "train")
        with pytest.raises(FileNotFoundError) as caught:
            crnn.load(tmp_path)
        for part in (f"{tmp_path / 'val'} has neither", str(tmp_path / "train"), "labels.txt", "data.args.folder="):
            assert part in str(caught.value)

    def test_a_line_without_a_word(self, crnn, tmp_path):
        (tmp_path / "labels.txt").write_text("a.png cat\n\nb.png\n")
        with pytest.raises(ValueError, match=r"labels.txt, line 3: needs an image's name and the word, got 'b.png'"):
            crnn.WordImages(tmp_path, 40, 4, "cat")

    def test_no_image(self, crnn, tmp_path):
        (tmp_path / "labels.txt").write_text("a.png cat")
        (tmp_path / "a.png").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"image 1, of the word 'cat', cannot be read: .*a\.png"):
            crnn.WordImages(tmp_path, 40, 4, "cat")[0]

    def test_no_lmdb(self, crnn, tmp_path):
        (tmp_path / "data.mdb").write_bytes(b"no database" * 1000)
        with pytest.raises(ValueError, match=r"data\.mdb is no LMDB of word images"):
            crnn.WordImages(tmp_path, 40, 4, "cat")

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ({}, "is no LMDB of word images: .* has no num-samples"),
            ({b"num-samples": b"many"}, "is no LMDB of word images"),
            ({b"num-samples": b"1"}, "has no label-000000001"),
            ({b"num-samples": b"1", b"label-000000001": b"\xfc"}, r"data\.mdb: label-000000001 is not in UTF-8"),
        ],
    )
    def test_an_lmdb_of_something_else(self, crnn, tmp_path, entries, message):
        with lmdb.open(str(tmp_path), map_size=1 << 20) as database, database.begin(write=True) as transaction:
            for key, value in entries.items():
                transaction.put(key, value)
        with pytest.raises(ValueError, match=message):
            crnn.WordImages(tmp_path, 40, 4, "cat")


def test_drawn(crnn):
    train, test = crnn.drawn(20, 10, width=48, longest=5)
    for dataset, count in ((train, 20), (test, 10)):
        images, targets = dataset.tensors
        assert images.dtype == torch.float32
        assert images.shape == (count, 1, 32, 48)
        assert images.min() >= -1
        assert images.max() <= 1
        assert images.flatten(1).std(1).min() > 0.1
        words = [text_of(crnn, row) for row in targets]
        assert all(3 <= len(word) <= 5 and word.isdigit() for word in words)
    assert not torch.equal(train.tensors[0][:10], test.tensors[0])
    assert torch.equal(crnn.drawn(20, 10, width=48)[0].tensors[0], train.tensors[0])
    letters = crnn.drawn(5, 1, alphabet="ab")[0].tensors[1]
    assert letters.max() == 2


@pytest.mark.parametrize("level", ["O0", "O1"])
def test_learns_one_batch(crnn, level):
    torch.set_num_threads(1)  # put back by tests/conftest.py
    images, targets = crnn.drawn(4, 1, width=32, longest=3)[0].tensors
    torch.manual_seed(0)
    net = crnn.CRNN(11, width=2, hidden=16)
    net, optimizer = cnmix.initialize(net, torch.optim.AdamW(net.parameters(), lr=1e-2), opt_level=level)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = crnn.ctc_loss(net(images), targets)
        losses.append(loss.item())
        with cnmix.scale_loss(loss, optimizer) as scaled_loss:
            scaled_loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
