"""Estimates what the layers of ResNet-50 take on the vendor's cards; nothing is measured.

    python benchmarks/card_estimates.py --batch 16 --train

Times are those of ``cnmix.torch_mlu.cost_model``, whose formula and sources docs/torch_mlu_profiling.md has: those of
kernels that reach the peak rate, so that a card takes longer. Operands of every product have the width of the column;
tensors in memory are of ``--dtype``, and no layers are fused. The network has no numbers (torch's meta device), so that
this takes a few seconds.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from report import table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cnmix.torch_mlu.cards import find_card
from cnmix.torch_mlu.cost_model import CostModel, tensors_in

CARDS = {
    **dict.fromkeys(("MLU220", "MLU270", "MLU290"), ("int8", "int16", "int31")),
    "MLU370": ("int8", "int16", "float32"),
}
STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # channels inside, blocks, stride of the first
OTHERS = "norms, activations, pooling"


class Bottleneck(nn.Module):
    """ResNet's block of 1×1, 3×3 and 1×1 convolutions, which gives four times its channels."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        sizes = ((channels_in, channels, 1, 1), (channels, channels, 3, stride), (channels, 4 * channels, 1, 1))
        self.convolutions = nn.ModuleList(nn.Conv2d(i, o, k, s, k // 2, bias=False) for i, o, k, s in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(size[1]) for size in sizes)
        self.shortcut: nn.Module = nn.Identity()
        if channels_in != 4 * channels:
            conv = nn.Conv2d(channels_in, 4 * channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(4 * channels))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels_in, H, W) to (N, 4 * channels, H / stride, W / stride)."""
        y = x
        for index, (convolve, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            y = norm(convolve(y if index == 0 else F.relu(y)))
        return F.relu(y + self.shortcut(x))


class ResNet50(nn.Module):
    """ResNet-50 as published (He et al., 2015), with the stride at the 3×3 convolutions, for 1000 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64)
        blocks, channels_in = [], 64
        for channels, count, stride in STAGES:
            for index in range(count):
                blocks.append(Bottleneck(channels_in, channels, stride if index == 0 else 1))
                channels_in = 4 * channels
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(channels_in, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) to logits (N, 1000)."""
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 3, 2, padding=1)
        return self.head(self.blocks(x).mean((2, 3)))


class Calls(TorchDispatchMode):
    """Notes every operator: its name, its arguments by name, and its result."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {
            each.name: args[index] if index < len(args) else kwargs.get(each.name, each.default_value)
            for index, each in enumerate(func._schema.arguments)
        }
        self.found.append((func.name(), given, result))
        return result


def label(name: str, arguments: Mapping[str, Any], result: Any) -> str:
    """Returns what a line of the table calls an operator that multiplies."""
    phase = " backward" if name.endswith("_backward") else ""
    if "weight" not in arguments:
        return f"{name.removeprefix('aten::')} " + ", ".join("×".join(map(str, x.shape)) for x in tensors_in(arguments))
    channels, inside, height, width = arguments["weight"].shape
    size = tuple(arguments["grad_output"].shape if phase else result.shape)[2:]
    stride = f" /{arguments['stride'][0]}" if arguments["stride"][0] > 1 else ""
    return f"{height}×{width}{stride} convolution{phase} {inside}→{channels}, {'×'.join(map(str, size))}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="images at once")
    parser.add_argument("--size", type=int, default=224, help="height and width of an image")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the tensors in memory")
    parser.add_argument("--train", action="store_true", help="a backward pass too")
    options = parser.parse_args()

    with torch.device("meta"), torch.set_grad_enabled(options.train):
        dtype = getattr(torch, options.dtype)
        network = ResNet50().to(dtype).train(options.train)
        with Calls() as calls:
            output = network(torch.empty(options.batch, 3, options.size, options.size, dtype=dtype))
            if options.train:
                output.sum().backward()

    columns = [(CostModel.of(find_card(card)), kind) for card, kinds in CARDS.items() for kind in kinds]
    rows: dict[str, list[float]] = {}
    times: Counter[str] = Counter()
    for name, arguments, result in calls.found:
        estimates = [model.operator(name, arguments, result, kind) for model, kind in columns]
        known = [each for each in estimates if each is not None and each.seconds]
        if not known:
            continue
        line = label(name, arguments, result) if known[0].products else OTHERS
        row = rows.setdefault(line, [0.0] * (1 + len(columns)))
        times[line] += 1
        for index, value in enumerate([known[0].macs, *(each.seconds for each in known)]):
            row[index] += value

    rows = {line: rows[line] for line in sorted(rows, key=lambda line: line == OTHERS)}
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    times["all"] = times.total()
    table(
        f"ResNet-50, {'training step' if options.train else 'inference'} of {options.batch}×3×{options.size}×"
        f"{options.size}, {options.dtype} in memory: milliseconds, ESTIMATED",
        ["layers", "calls", "GMACs", *(f"{model.card.name[3:]}\n{kind}" for model, kind in columns)],
        [
            (line, f"{times[line]}", f"{macs / 1e9:.3g}", *(f"{1e3 * each:.3g}" for each in seconds))
            for line, (macs, *seconds) in rows.items()
        ],
        caption="; ".join(filter(None, dict.fromkeys(model.card.note for model, _ in columns))),
    )


if __name__ == "__main__":
    main()
