"""CRNN: convolutions, a bidirectional LSTM and CTC read words from images (Shi et al., 2015).

Word images are read from an LMDB or from a folder, and never downloaded; ``drawn`` makes some with Pillow's font.
"""

import io
import logging
import os
import re
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
BLANK = 0  # of CTC; character i of the alphabet is class i + 1. Also what fills targets up behind a word
HEIGHT = 32  # which the convolutions make one row of
LABELS = "labels.txt"

logger = logging.getLogger("cnmix")


class CRNN(nn.Module):
    """Seven convolutions that make a sequence of an image's columns, two bidirectional LSTM layers, a linear layer.

    Args:
        classes: characters, and one for the blank.
        width: channels of the first convolution; the others have up to eight times as many. 64 is the network.
        hidden: features of an LSTM layer in each direction; 256 in the network.

    Raises:
        ValueError: if one of them is below 1.
    """

    def __init__(self, classes: int = len(ALPHABET) + 1, width: int = 64, hidden: int = 256) -> None:
        super().__init__()
        for name, value in {"classes": classes, "width": width, "hidden": hidden}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        layers: list[nn.Module] = []
        channels_in = 1
        for number, times in enumerate((1, 2, 4, 4, 8, 8, 8)):
            channels, last = times * width, number == 6
            layers.append(nn.Conv2d(channels_in, channels, 2 if last else 3, padding=0 if last else 1))
            if number in (2, 4, 6):
                layers.append(nn.BatchNorm2d(channels))
            layers.append(nn.ReLU(inplace=True))
            if number in (0, 1):
                layers.append(nn.MaxPool2d(2))
            elif number in (3, 5):  # columns stay, for narrow characters
                layers.append(nn.MaxPool2d(2, (2, 1), (0, 1)))
            channels_in = channels
        self.features = nn.Sequential(*layers)
        self.lstm = nn.LSTM(channels_in, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(2 * hidden, classes)
        for name, parameter in self.lstm.named_parameters():
            # torch's own weights shrink what comes in with every layer, and CTC begins with blanks for the longer
            if "weight_ih" in name:
                nn.init.xavier_uniform_(parameter)
            elif "weight_hh" in name:
                for gate in parameter.chunk(4):
                    nn.init.orthogonal_(gate)
            else:
                nn.init.zeros_(parameter)
        nn.init.xavier_uniform_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Reads images.

        Args:
            x: grey images, (N, 1, 32, W).

        Returns:
            Logits, (N, W // 4 + 1, classes): from left to right, of a character or the blank.
        """
        columns = self.features(x).squeeze(2).transpose(1, 2)
        return self.fc(self.lstm(columns)[0])


def ctc_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean CTC loss of a batch, over the characters of each word.

    Args:
        outputs: logits, (N, T, classes).
        targets: classes, int64, (N, L), filled up with zeros. A word with more characters than there are steps counts
            nothing.
    """
    lengths = torch.full((len(outputs),), outputs.shape[1], dtype=torch.int64)
    scores = outputs.float().log_softmax(2).transpose(0, 1)
    return F.ctc_loss(scores, targets, lengths, (targets != BLANK).sum(1), blank=BLANK, zero_infinity=True)


def decode(outputs: Tensor) -> list[list[int]]:
    """Returns what is read of each image: the best class of each step, repetitions once, blanks left out."""
    return [[each for each in torch.unique_consecutive(row).tolist() if each != BLANK] for row in outputs.argmax(2)]


def words_right(outputs: Tensor, targets: Tensor) -> tuple[int, int]:
    """Returns how many words are read without a mistake, and of how many; shapes as ``ctc_loss`` has them."""
    words = [row[row != BLANK].tolist() for row in targets]
    return sum(found == word for found, word in zip(decode(outputs), words, strict=True)), len(words)


class Source(Protocol):
    """Where word images are."""

    def word(self, index: int) -> str:
        """Returns a word."""

    def image(self, index: int) -> Path | io.BytesIO:
        """Returns its image, a file."""

    def __len__(self) -> int:
        """Returns how many there are."""


class Lmdb:
    """Word images in an LMDB: ``num-samples``, and ``image-000000001`` with ``label-000000001`` from there on.

    Args:
        folder: of ``data.mdb``.

    Raises:
        ImportError: if lmdb is not installed.
        ValueError: if it is no LMDB of word images.
    """

    def __init__(self, folder: Path) -> None:
        import lmdb

        self.folder = folder
        try:
            # Without locks it is a file in memory, which the processes that a loader forks may go on reading.
            self._reading = lmdb.open(str(folder), readonly=True, lock=False, readahead=False).begin()
            self._count = int(self._read("num-samples"))
        except (lmdb.Error, ValueError) as error:
            raise ValueError(f"{folder / 'data.mdb'} is no LMDB of word images: {error}") from error

    def __len__(self) -> int:
        """Returns how many word images there are."""
        return self._count

    def word(self, index: int) -> str:
        """Returns a word."""
        key = f"label-{index + 1:09d}"
        try:
            return self._read(key).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.folder / 'data.mdb'}: {key} is not in UTF-8: {error}") from error

    def image(self, index: int) -> io.BytesIO:
        """Returns its image, a file."""
        return io.BytesIO(self._read(f"image-{index + 1:09d}"))

    def _read(self, key: str) -> bytes:
        value = self._reading.get(key.encode())
        if value is None:
            raise ValueError(f"{self.folder / 'data.mdb'} has no {key}")
        return bytes(value)


class Folder:
    """Word images in a folder, and ``labels.txt`` with a line for each: its name, a space, the word.

    Args:
        folder: of ``labels.txt``, which the names are relative to.

    Raises:
        ValueError: if a line has another form.
    """

    def __init__(self, folder: Path) -> None:
        self._pairs: list[tuple[Path, str]] = []
        try:
            lines = (folder / LABELS).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{folder / LABELS} is not in UTF-8: {error}") from error
        for number, line in enumerate(lines, 1):
            parts = line.split(maxsplit=1)
            if len(parts) == 1:
                raise ValueError(f"{folder / LABELS}, line {number}: needs an image's name and the word, got {line!r}")
            if parts:
                self._pairs.append((folder / parts[0], parts[1].strip()))

    def __len__(self) -> int:
        """Returns how many word images there are."""
        return len(self._pairs)

    def word(self, index: int) -> str:
        """Returns a word."""
        return self._pairs[index][1]

    def image(self, index: int) -> Path:
        """Returns its image, a file."""
        return self._pairs[index][0]


class WordImages(Dataset[tuple[Tensor, Tensor]]):
    """Images of words, grey, stretched to one size. Words are read in lower case.

    Args:
        folder: with ``data.mdb``, an LMDB, or with ``labels.txt`` and images.
        width: of the images in pixels; their height is 32.
        longest: characters that a word may have.
        alphabet: of the words; those with other characters, and longer ones, are left out, with a word of how many.

    Raises:
        FileNotFoundError: if the folder has neither of the two.
        ValueError: if no word is left, or a file is not what it should be.
    """

    def __init__(self, folder: Path, width: int, longest: int, alphabet: str) -> None:
        self.folder = folder
        if (folder / "data.mdb").is_file():
            self.source: Source = Lmdb(folder)
        elif (folder / LABELS).is_file():
            self.source = Folder(folder)
        else:
            raise FileNotFoundError(f"{folder} has neither an LMDB's data.mdb nor {LABELS}")
        self.width, self.longest, self.alphabet = width, longest, alphabet
        known = re.compile(f"[{re.escape(alphabet)}]{{1,{longest}}}")
        self.indices = [index for index in range(len(self.source)) if known.fullmatch(self.source.word(index).lower())]
        if not self.indices:
            raise ValueError(
                f"{folder} has no word of 1 to {longest} of the characters {alphabet}, among {len(self.source)}"
            )
        others = len(self.source) - len(self.indices)
        if others:
            logger.warning(
                "%s: %d of %d words are left out, of other characters or longer", folder, others, len(self.source)
            )

    def __len__(self) -> int:
        """Returns how many words there are, without those that were left out."""
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns an image, float32, (1, 32, width), and its word's classes, int64, (longest,)."""
        number = self.indices[index]
        word = self.source.word(number)
        try:
            with Image.open(self.source.image(number)) as opened:
                image = opened.convert("L")
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{self.folder}: image {number + 1}, of the word {word!r}, cannot be read: {error}"
            ) from error
        pixels = np.array(image.resize((self.width, HEIGHT), Image.Resampling.BILINEAR))
        return scale(torch.from_numpy(pixels)).unsqueeze(0), encode(word.lower(), self.longest, self.alphabet)


def scale(pixels: Tensor) -> Tensor:
    """Maps pixels of 0 to 255 to -1 to 1, float32."""
    return pixels.float() / 127.5 - 1


def encode(word: str, longest: int, alphabet: str = ALPHABET) -> Tensor:
    """Returns a word's classes, int64, (longest,), zeros behind them."""
    return torch.tensor([alphabet.index(each) + 1 for each in word] + [BLANK] * (longest - len(word)))


def load(
    folder: str | os.PathLike[str],
    width: int = 100,
    longest: int = 25,
    alphabet: str = ALPHABET,
    classes: int = len(ALPHABET) + 1,
) -> tuple[WordImages, WordImages]:
    """Reads word images for training and for the test.

    Args:
        folder: has ``train`` and ``val``, each as ``WordImages`` takes it; ``~`` is the home folder.
        width: of the images in pixels.
        longest: characters that a word may have.
        alphabet: of the words, small letters, each once.
        classes: how many the network tells apart, one more than characters.

    Raises:
        FileNotFoundError: if images are missing; the message says where they belong.
        ValueError: as ``WordImages`` does; if the arguments do not fit each other.
    """
    if not isinstance(alphabet, str) or alphabet != alphabet.lower() or len(set(alphabet)) < len(alphabet):
        raise ValueError(f"alphabet must be a text of small letters and other characters, each once, got {alphabet!r}")
    if len(alphabet) + 1 != classes:
        raise ValueError(
            f"the alphabet has {len(alphabet)} characters, and the network tells {classes} classes apart: give "
            f"model.args.classes={len(alphabet) + 1}, the blank among them"
        )
    if not 1 <= longest <= width // 4 + 1:
        raise ValueError(f"longest must lie in [1, {width // 4 + 1}], the steps of a width of {width}, got {longest}")
    root = Path(folder).expanduser().absolute()
    try:
        return (
            WordImages(root / "train", width, longest, alphabet),
            WordImages(root / "val", width, longest, alphabet),
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}. Put word images into {root / 'train'} and {root / 'val'}, as an LMDB or with a {LABELS} (a line "
            "for each image: name, space, word), or name their folder with data.args.folder=; nothing is downloaded"
        ) from None


def drawn(
    train_images: int,
    test_images: int,
    width: int = 64,
    longest: int = 5,
    alphabet: str = "0123456789",
    noise: float = 0.1,
) -> tuple[TensorDataset, TensorDataset]:
    """Draws words of random characters in Pillow's font: dark on light or light on dark, turned, stretched, noisy.

    Args:
        train_images: how many for training.
        test_images: how many for the test.
        width: of the images in pixels.
        longest: characters of a word; the shortest have three.
        alphabet: characters of the words.
        noise: standard deviation of what is added to each pixel, of a range of 0 to 1.

    Returns:
        Images, float32, (N, 1, 32, width), and the classes of their characters, int64, (N, longest), for each of the
        two.
    """
    train, test = (
        TensorDataset(*_draw(np.random.default_rng(seed), count, width, longest, alphabet, noise))
        for seed, count in ((1, train_images), (2, test_images))
    )
    return train, test


def _draw(
    generator: np.random.Generator, count: int, width: int, longest: int, alphabet: str, noise: float
) -> tuple[Tensor, Tensor]:
    font = ImageFont.load_default(24)
    images, targets = [], []
    for _ in range(count):
        word = "".join(generator.choice(list(alphabet), generator.integers(3, longest + 1)))
        left, top, right, bottom = font.getbbox(word)
        margins = generator.integers(1, 6, 4).tolist()
        size = (int(right - left) + margins[0] + margins[1], int(bottom - top) + margins[2] + margins[3])
        image = Image.new("L", size)
        ImageDraw.Draw(image).text((margins[0] - left, margins[2] - top), word, 255, font)
        image = image.rotate(generator.uniform(-4, 4), Image.Resampling.BILINEAR)
        ink = np.array(image.resize((width, HEIGHT), Image.Resampling.BILINEAR)) / 255
        ground, contrast = generator.uniform(0.4, 0.6), generator.uniform(0.3, 0.5) * generator.choice([-1, 1])
        pixels = ground + contrast * ink + noise * generator.standard_normal(ink.shape)
        images.append(torch.from_numpy(255 * pixels.clip(0, 1)))
        targets.append(encode(word, longest, alphabet))
    return scale(torch.stack(images)).unsqueeze(1), torch.stack(targets)
