"""MNIST: the network of the vendor's quick guide, and the four IDX files as tensors.

The files are read from disk and never downloaded: put the four of them into one folder, plain or gzipped, and name
that folder to `load`. `upscaled_digits` makes such images of those that come with scikit-learn.
"""

import gzip
import math
import os
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

# torchvision's downloads lie in MNIST/raw under the folder that the user named; the vendor's guide says raw.
SUBFOLDERS = ("", "raw", "MNIST/raw")

# Yann LeCun's page spelled the names with dashes only; several mirrors unpack them with a dot before "idx".
FILES = {
    "train-images-idx3-ubyte": "train-images.idx3-ubyte",
    "train-labels-idx1-ubyte": "train-labels.idx1-ubyte",
    "t10k-images-idx3-ubyte": "t10k-images.idx3-ubyte",
    "t10k-labels-idx1-ubyte": "t10k-labels.idx1-ubyte",
}

GZIP_MAGIC = b"\x1f\x8b"
UNSIGNED_BYTE = 0x08
SIDE = 28
MEAN, DEVIATION = 0.1307, 0.3081  # of MNIST's pixels in [0, 1]
CLASSES = 10


class Net(nn.Module):
    """The MNIST network of the vendor's guide: two convolutions and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.dropout1 = nn.Dropout2d(0.25)
        # The guide's Dropout2d does the same to two dimensions, but newer PyTorch deprecates that and warns.
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classifies a batch of images.

        Args:
            x: normalised images, float32, shape (N, 1, 28, 28).

        Returns:
            Log-probabilities of the ten digits, float32, shape (N, 10). Cross-entropy takes them as it takes logits:
            the logarithm of their softmax is themselves.
        """
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = self.dropout1(F.max_pool2d(x, 2))
        x = torch.flatten(x, 1)
        x = self.dropout2(F.relu(self.fc1(x)))
        return F.log_softmax(self.fc2(x), dim=1)


def read_idx(path: str | os.PathLike[str]) -> Tensor:
    """Reads one IDX file of unsigned bytes, plain or gzipped.

    Whether the file is gzipped is told by its first two bytes, so its name does not matter.

    Args:
        path: the file.

    Returns:
        The file's values, uint8, in the shape that its header states (any number of dimensions from one up).

    Raises:
        OSError: the file cannot be read (FileNotFoundError where there is none).
        ValueError: the file is not a whole IDX file of unsigned bytes; the message names the path and what is wrong.
    """
    path = Path(path)
    # torch.frombuffer warns about a buffer that cannot be written, and bytes are one.
    data = bytearray(path.read_bytes())
    if data.startswith(GZIP_MAGIC):
        try:
            data = bytearray(gzip.decompress(data))
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: corrupt gzip data ({error})") from error

    if len(data) < 4:
        raise ValueError(f"{path}: truncated IDX header: expected at least 4 bytes, got {len(data)}")
    if data[0] or data[1]:
        raise ValueError(f"{path}: not an IDX file: wrong magic number 0x{data[:4].hex()}, expected 0x0000 first")
    kind, dimensions = data[2], data[3]
    if kind != UNSIGNED_BYTE:
        raise ValueError(f"{path}: IDX data type 0x{kind:02x}, expected 0x{UNSIGNED_BYTE:02x} (unsigned byte)")
    if dimensions == 0:
        raise ValueError(f"{path}: IDX dimension count 0, expected at least 1")

    header = 4 + 4 * dimensions
    if len(data) < header:
        raise ValueError(
            f"{path}: truncated IDX header: {dimensions} dimensions need {header} bytes, the file has {len(data)}"
        )
    shape = [int.from_bytes(data[start : start + 4], "big") for start in range(4, header, 4)]
    expected, actual = math.prod(shape), len(data) - header
    if actual != expected:
        wrong = "truncated data" if actual < expected else "trailing bytes after the data"
        raise ValueError(
            f"{path}: {wrong}: shape {' x '.join(map(str, shape))} needs {expected} bytes after the header, "
            f"the file has {actual}"
        )
    # torch.frombuffer refuses an offset at the very end of its buffer.
    values = torch.frombuffer(data, dtype=torch.uint8, offset=header) if actual else torch.empty(0, dtype=torch.uint8)
    try:
        return values.reshape(shape)
    except RuntimeError as error:
        raise ValueError(f"{path}: no tensor can have the shape {' x '.join(map(str, shape))}") from error


def load(
    folder: str | os.PathLike[str] = "data/mnist", mean: float = MEAN, std: float = DEVIATION
) -> tuple[TensorDataset, TensorDataset]:
    """Reads MNIST's training and test images from a folder.

    Each of the four files may be plain or gzipped, may be spelled `train-images-idx3-ubyte` or
    `train-images.idx3-ubyte`, with or without `.gz`, and may lie in the folder itself, in its `raw` or in its
    `MNIST/raw`.

    Args:
        folder: the folder, absolute or relative to the current one; `~` is the home folder.
        mean: what is subtracted from pixels in the range 0 to 1.
        std: what they are then divided by, above 0.

    Returns:
        The training and the test set. Each holds images, float32, shape (N, 1, 28, 28), and labels, int64, shape
        (N,), from 0 to 9; the published files give N = 60,000 and 10,000.

    Raises:
        FileNotFoundError: files are missing; the message lists them and says where they belong.
        OSError: a file cannot be read.
        ValueError: a file is not what MNIST has there; the message names its path and what is wrong. Also where `mean`
            is not finite, or `std` not finite and above 0.
    """
    if not math.isfinite(mean):
        raise ValueError(f"mean must be finite, got {mean!r}")
    if not (math.isfinite(std) and std > 0):
        raise ValueError(f"std must be finite and above 0, got {std!r}")
    root = Path(folder).expanduser().absolute()
    train_images, train_labels, test_images, test_labels = _find(root)
    return _read_pair(train_images, train_labels, mean, std), _read_pair(test_images, test_labels, mean, std)


def upscaled_digits(test_share: float = 0.25, split_seed: int = 0) -> tuple[TensorDataset, TensorDataset]:
    """Makes images as MNIST's of scikit-learn's 8x8 digits: 20 pixels wide in a border of 4, normalized as MNIST's are.

    Args:
        test_share: share of the 1,797 images in the test set, above 0 and below 1.
        split_seed: of the split, which has the digits in equal shares.

    Returns:
        The training and the test set, as `load` returns them.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: scikit-learn refuses the share or the seed.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(
        digits.images, digits.target, test_size=test_share, random_state=split_seed, stratify=digits.target
    )
    train_images, test_images, train_labels, test_labels = (torch.as_tensor(part) for part in parts)
    return _upscale(train_images, train_labels), _upscale(test_images, test_labels)


def _upscale(images: Tensor, labels: Tensor) -> TensorDataset:
    """Returns images (N, 8, 8) of 0 to 16 as normalized ones (N, 1, 28, 28), with their labels."""
    large = F.interpolate(images.unsqueeze(1).to(torch.float32) / 16, size=(20, 20), mode="bilinear")
    return TensorDataset((F.pad(large, (4, 4, 4, 4)) - MEAN) / DEVIATION, labels.to(torch.int64))


def _find(root: Path) -> list[Path]:
    """Returns the paths of the four files in FILES' order.

    Raises:
        FileNotFoundError: at least one is missing.
    """
    folders = [root / subfolder for subfolder in SUBFOLDERS]
    found, missing = [], []
    for name, other in FILES.items():
        spellings = (name, f"{name}.gz", other, f"{other}.gz")
        paths = (place / spelling for place in folders for spelling in spellings)
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            missing.append(name)
        else:
            found.append(path)
    if missing:
        looked = ", ".join(map(str, folders))
        raise FileNotFoundError(
            f"MNIST is missing {len(missing)} of {len(FILES)} files: {', '.join(missing)}. "
            f"Put them into {root}, unpacked or gzipped (.gz); nothing is downloaded. "
            f"Looked in {looked}, also for the spelling {FILES[missing[0]]}."
        )
    return found


def _read_pair(images_path: Path, labels_path: Path, mean: float, std: float) -> TensorDataset:
    """Returns normalised float32 images (N, 1, 28, 28) with int64 labels (N,).

    Raises:
        ValueError: the files are not MNIST images and as many labels.
    """
    images, labels = read_idx(images_path), read_idx(labels_path)
    for path, values, dimensions, what in ((images_path, images, 3, "images"), (labels_path, labels, 1, "labels")):
        if values.ndim != dimensions:
            raise ValueError(f"{path}: IDX dimension count {values.ndim}, expected {dimensions} for {what}")
    count, height, width = images.shape
    if (height, width) != (SIDE, SIDE):
        raise ValueError(f"{images_path}: images of {height} x {width} pixels, expected {SIDE} x {SIDE}")
    if count != len(labels):
        raise ValueError(f"{labels_path}: {len(labels)} labels, but {images_path} has {count} images")
    if count == 0:
        raise ValueError(f"{images_path}: no images in the file")
    wrong = (labels >= CLASSES).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(f"{labels_path}: label {int(labels[at])} at index {at}, expected 0 to {CLASSES - 1}")
    # In place, because the training set takes 188 MB at each step.
    pixels = images.unsqueeze(1).to(torch.float32).div_(255).sub_(mean).div_(std)
    return TensorDataset(pixels, labels.to(torch.int64))
