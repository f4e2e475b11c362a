"""What examples in the reference pages take as given: what a training script has around the lines that they show."""

from pathlib import Path
from typing import Any

import lightning.fabric
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import cnmix


class Attention(nn.Module):
    """One head of attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.query_key_value(x).chunk(3, -1))


class Net(nn.Module):
    """Classifies images (N, 1, 8, 8) into three classes; has the parts that examples of rules name."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1))
        self.project = nn.Linear(16, 16)
        self.attention = Attention(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.project(self.encoder(x).flatten(2).transpose(1, 2))
        return self.head(self.attention(tokens).mean(1))


def objects() -> dict[str, Any]:
    """Returns them afresh, by name."""
    torch.manual_seed(0)
    images, classes = torch.randn(16, 1, 8, 8), torch.randint(0, 3, (16,))
    model = Net()
    return {
        "lightning": lightning,
        "torch": torch,
        "nn": nn,
        "F": F,
        "cnmix": cnmix,
        "Net": Net,
        "build_model": Net,
        "model": model,
        "net": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.01),
        "criterion": F.cross_entropy,
        "cross_entropy": F.cross_entropy,
        "images": images,
        "inputs": images,
        "classes": classes,
        "loader": DataLoader(TensorDataset(images, classes), 8),
    }


def save_checkpoint(path: Path) -> None:
    """Saves the network and what its quantizers know, after a step of training."""
    given = objects()
    model, optimizer = cnmix.initialize(given["model"], given["optimizer"])
    given["criterion"](model(given["images"]), given["classes"]).backward()
    optimizer.step()
    torch.save({"state_dict": model.state_dict(), "cnmix": cnmix.state_dict(model)}, path)
