"""The network of most tests, in a module of its own: there are several conftest.py, and a pickle names the module."""

import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """A convolution, a batch normalisation and two linear layers, for 3 classes of (N, 1, 6, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc1 = nn.Linear(64, 8)
        self.fc2 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(F.relu(self.bn(self.conv(x))).flatten(1))))
