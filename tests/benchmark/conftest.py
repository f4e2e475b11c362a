from pathlib import Path

import pytest

MODULE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).flatten(1))


def load(samples=20):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 1, 4, 4, generator=generator)
    return TensorDataset(x, (x.mean((1, 2, 3)) > 0).long()), TensorDataset(x[:6], torch.zeros(6, dtype=torch.long))
"""

RECIPE = """
module: small.py
model: {name: Net}
data: {name: load}
batch_size: 8
epochs: 2
optimizer: {name: SGD, args: {lr: 0.05, momentum: 0.9}}
threads: 1
tiny: {batch_size: 4}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of 20 samples."""
    (tmp_path / "small.py").write_text(MODULE)
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path / "small.yaml"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets none of the variables."""
    for name in ("BENCHMARK_LOG", "AVG_LOG", "DATASET_NAME", "MLU_ADAPTIVE_STRATEGY_COUNT", "CATCH_MODEL_TOTAL_ITERS"):
        monkeypatch.delenv(name, raising=False)
