"""Scikit-learn's 8 × 8 handwritten digits as tensors, for the examples beside this file."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import TensorDataset


def load() -> tuple[TensorDataset, TensorDataset]:
    """Returns 1,347 training and 450 test images, float32 (1, 8, 8), each with its digit, int64."""
    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    classes = torch.as_tensor(digits.target)
    train, test = train_test_split(torch.arange(len(images)), test_size=450, random_state=0, stratify=classes)
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std
    return TensorDataset(images[train], classes[train]), TensorDataset(images[test], classes[test])
