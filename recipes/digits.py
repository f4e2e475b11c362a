"""Scikit-learn's 8x8 handwritten digits: a small convolutional network, and the data as tensors.

The 1,797 images come with scikit-learn, so nothing is downloaded and one run takes seconds on a CPU.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

SAMPLES = 1797
CLASSES = 10


class Net(nn.Module):
    """Two blocks of convolution, batch normalisation and ReLU, then two linear layers.

    Args:
        channels: output channels of the first convolution, at least 1; the second one has twice as many.
        dropout: share of features zeroed before the first linear layer in training, from 0 to below 1.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, channels: int = 32, dropout: float = 0.25) -> None:
        super().__init__()
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
            raise ValueError(f"channels must be an integer of at least 1, got {channels!r}")
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ValueError(f"dropout must be a number from 0 to below 1, got {dropout!r}")
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(2 * channels)
        self.dropout = nn.Dropout(dropout)
        self.fc1 = nn.Linear(2 * channels * 4 * 4, 128)
        self.fc2 = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Classifies a batch of images.

        Args:
            x: scaled images, float32, shape (N, 1, 8, 8).

        Returns:
            Logits of the ten digits, float32, shape (N, 10).
        """
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.dropout(F.max_pool2d(x, 2))
        x = torch.flatten(x, 1)
        return self.fc2(F.relu(self.fc1(x)))


def load(test_share: float = 0.25, split_seed: int = 0) -> tuple[TensorDataset, TensorDataset]:
    """Splits scikit-learn's digits into a training and a test set, with the digits in equal shares.

    Pixels are scaled by the mean and the standard deviation of all training pixels, so the training set has mean 0
    and standard deviation 1, and the test set nearly so.

    Args:
        test_share: share of the 1,797 images in the test set, above 0 and below 1; both sets must get at least 10.
        split_seed: seed of the split, from 0 to 2**32 - 1; the same seed gives the same split.

    Returns:
        The training and the test set. Each holds images, float32, shape (N, 1, 8, 8), and labels, int64, shape (N,),
        from 0 to 9; a share of 0.25 gives N = 1,347 and 450.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: an argument is out of its range; the message names its value.
    """
    if isinstance(test_share, bool) or not isinstance(test_share, int | float) or not 0 < test_share < 1:
        raise ValueError(f"test_share must be a number above 0 and below 1, got {test_share!r}")
    if isinstance(split_seed, bool) or not isinstance(split_seed, int) or not 0 <= split_seed < 2**32:
        raise ValueError(f"split_seed must be an integer from 0 to 2**32 - 1, got {split_seed!r}")
    test_count = math.ceil(test_share * SAMPLES)
    if not CLASSES <= test_count <= SAMPLES - CLASSES:
        raise ValueError(
            f"test_share {test_share!r} puts {test_count} of {SAMPLES} images into the test set and "
            f"{SAMPLES - test_count} into the training set, each needs at least {CLASSES}"
        )

    # Here, so that the network can be had without scikit-learn.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train_images, test_images, train_labels, test_labels = train_test_split(
        digits.images, digits.target, test_size=test_count, random_state=split_seed, stratify=digits.target
    )
    mean, std = train_images.mean(), train_images.std()

    train = TensorDataset(_pixels((train_images - mean) / std), torch.as_tensor(train_labels, dtype=torch.int64))
    test = TensorDataset(_pixels((test_images - mean) / std), torch.as_tensor(test_labels, dtype=torch.int64))
    return train, test


def _pixels(images: np.ndarray) -> Tensor:
    """Returns float64 images (N, 8, 8) as float32 (N, 1, 8, 8)."""
    return torch.as_tensor(images, dtype=torch.float32).unsqueeze(1)
