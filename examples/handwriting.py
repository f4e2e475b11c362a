"""Scikit-learn's 8 × 8 handwritten digits and a small network, for the examples beside this file."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
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


def build_model() -> nn.Module:
    """Returns a small convolutional network for images (N, 1, 8, 8) of ten digits."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(1024, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Returns the share of images that the model classifies right."""
    images, classes = data.tensors
    return (model.eval()(images).argmax(1) == classes).float().mean().item()
