"""The networks of the training-step benchmark, each with one batch of random data, a loss and a learning rate."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "mnist.py"


@dataclass(frozen=True)
class Task:
    """A network and what it is trained on.

    Attributes:
        title: what tables and plots call it.
        build: makes the network; the weights follow torch's global seed.
        batch: makes inputs and targets, the same ones on every call.
        loss: the scalar loss of the network's output and the targets.
        learning_rate: of SGD.
    """

    title: str
    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    learning_rate: float


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        width: features of a position.
        heads: attention heads.
        causal: whether a position sees only itself and what is before it.
        dropout: of the attention weights.
        fused: one Linear for query, key and value (GPT) instead of three (BERT).
    """

    def __init__(self, width: int, heads: int, causal: bool, dropout: float, fused: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        parts = (3 * width,) if fused else (width, width, width)
        self.projections = nn.ModuleList(nn.Linear(width, part) for part in parts)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, positions, width) to the same shape."""
        batch, positions, width = x.shape
        if len(self.projections) == 1:
            parts = self.projections[0](x).chunk(3, dim=-1)
        else:
            parts = tuple(projection(x) for projection in self.projections)
        q, k, v = (part.view(batch, positions, self.heads, -1).transpose(1, 2) for part in parts)
        dropout = self.dropout.p if self.dropout.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.causal)
        return self.output(y.transpose(1, 2).reshape(batch, positions, width))


class FeedForward(nn.Sequential):
    """Two Linear layers with GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class BertLayer(nn.Module):
    """A layer of BERT-base's encoder: post-norm, GELU, dropout."""

    def __init__(self, width: int = 768, heads: int = 12, hidden: int = 3072, dropout: float = 0.1) -> None:
        super().__init__()
        self.attention = Attention(width, heads, causal=False, dropout=dropout, fused=False)
        self.norm1 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, hidden)
        self.norm2 = nn.LayerNorm(width)
        self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, positions, width) to the same shape."""
        x = self.norm1(x + self.dropout1(self.attention(x)))
        return self.norm2(x + self.dropout2(self.feed_forward(x)))


class GptBlock(nn.Module):
    """A block of a GPT: pre-norm, causal attention, four times the width inside, no dropout."""

    def __init__(self, width: int = 512, heads: int = 8) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=True, dropout=0.0, fused=True)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, positions, width) to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class BasicBlock(nn.Module):
    """ResNet's block of two 3x3 convolutions."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            conv = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels_in, H, W) to (N, channels, H / stride, W / stride)."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 as published (He et al., 2015), for 1000 classes."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(64)
        blocks: list[nn.Module] = []
        channels_in = 64
        for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            blocks += [BasicBlock(channels_in, channels, stride), BasicBlock(channels, channels, 1)]
            channels_in = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) to logits (N, classes)."""
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 3, 2, padding=1)
        return self.head(self.blocks(x).mean((2, 3)))


def _mlp(width: int = 2048) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
    )


def _bert(layers: int = 4) -> nn.Module:
    return nn.Sequential(*(BertLayer() for _ in range(layers)))


def _gpt(blocks: int = 6, width: int = 512) -> nn.Module:
    return nn.Sequential(*(GptBlock(width) for _ in range(blocks)), nn.LayerNorm(width))


def _mnist() -> nn.Module:
    spec = importlib.util.spec_from_file_location("mnist_recipe", RECIPE)
    if spec is None or spec.loader is None:
        raise ImportError(f"{RECIPE} cannot be loaded")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe.Net()


def _regression(*shape: int) -> Callable[[], tuple[Tensor, Tensor]]:
    def batch() -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)

    return batch


def _classification(classes: int, *shape: int, targets: tuple[int, ...]) -> Callable[[], tuple[Tensor, Tensor]]:
    def batch() -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(shape, generator=generator), torch.randint(classes, targets, generator=generator)

    return batch


def _token_loss(output: Tensor, tokens: Tensor) -> Tensor:
    """Returns the cross-entropy of every position, its features being the logits: one large gradient among small ones.

    A squared error would spread the gradient evenly, and flatter whatever quantizes it.
    """
    return F.cross_entropy(output.flatten(0, 1), tokens.flatten())


TASKS: dict[str, Task] = {
    "mlp": Task("MLP 3×2048, batch 1024", _mlp, _regression(1024, 2048), F.mse_loss, 0.1),
    "bert": Task(
        "BERT-base ×4 layers, 8×128",
        _bert,
        _classification(768, 8, 128, 768, targets=(8, 128)),
        _token_loss,
        0.1,
    ),
    "resnet18": Task(
        "ResNet-18, 32×3×64×64",
        ResNet18,
        _classification(1000, 32, 3, 64, 64, targets=(32,)),
        F.cross_entropy,
        0.01,
    ),
    "mnist": Task(
        "MNIST network, batch 64",
        _mnist,
        _classification(10, 64, 1, 28, 28, targets=(64,)),
        F.cross_entropy,
        0.01,
    ),
    "gpt": Task(
        "GPT ×6 blocks 512, 8×256",
        _gpt,
        _classification(512, 8, 256, 512, targets=(8, 256)),
        _token_loss,
        0.1,
    ),
}
