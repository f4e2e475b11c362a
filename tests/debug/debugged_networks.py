"""Networks of which it is known what fixed point does to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loss(output: Tensor) -> Tensor:
    return output.square().mean()


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.into, self.out, self.dropout = nn.Linear(16, 48), nn.Linear(16, 16), dropout

    def forward(self, x: Tensor) -> Tensor:
        heads = self.into(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*heads, dropout_p=self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(16, 16), nn.Linear(16, 16), reentrant

    def _part(self, x: Tensor) -> Tensor:
        return F.relu(self.second(x)) @ x.transpose(-1, -2)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._part, self.first(x), use_reentrant=self.reentrant)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, **settings: Any) -> None:
        super().__init__()
        self.rnn = kind(16, 12, batch_first=True, **settings)
        self.head = nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class Many(nn.Module):
    """Products of most kinds, one behind the other, with what makes runs differ: dropout, and writing in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(16, 16, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm1d(16)
        self.table = nn.Parameter(random(16, 16) / 4)
        self.attention = Attention(0.1)
        self.drop = nn.Dropout(0.2)
        self.multihead = nn.MultiheadAttention(16, 4, dropout=0.1, batch_first=True)
        self.lstm = nn.LSTM(16, 12, 2, batch_first=True, dropout=0.2, bidirectional=True)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x.transpose(1, 2))).transpose(1, 2)
        x = F.relu(x @ self.table, inplace=True)
        x = self.drop(x + self.attention(x))
        x = x + self.multihead(x, x, x)[0]
        return self.head(self.lstm(x)[0])


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8),
        nn.Conv2d(8, 8, 1),
        nn.BatchNorm2d(8),
        nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(4 * 64, 4),
    )


def mlp() -> nn.Sequential:
    return nn.Sequential(
        *(layer for _ in range(4) for layer in (nn.Linear(32, 32), nn.LayerNorm(32), nn.Tanh())), nn.Linear(32, 8)
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (7, 32)),
    "convolutions": (convolutions, (3, 4, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 3, padding="same"), (2, 2, 4, 4, 4)),
    "bilinear": (lambda: Pair(), (5, 16)),
    "attention": (Attention, (2, 6, 16)),
    "lstm": (lambda: Recurrent(nn.LSTM, bidirectional=True), (3, 6, 16)),
    "gru": (lambda: Recurrent(nn.GRU, num_layers=2), (3, 6, 16)),
    "rnn": (lambda: Recurrent(nn.RNN), (3, 6, 16)),
    "checkpointed": (lambda: Checkpointed(False), (6, 16)),
    "reentrant": (lambda: Checkpointed(True), (6, 16)),
}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(16, 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x, x.flip(0))


def made(name: str) -> tuple[nn.Module, Tensor]:
    """Returns the network of this name, with the same weights each time, and a batch."""
    torch.manual_seed(3)
    make, shape = NETWORKS[name]
    model, x = make(), random(*shape)
    model.eval()(x)  # gives lazy modules their shapes
    return model.train(), x
