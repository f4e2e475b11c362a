"""Draws the pictures of the documentation with the library's own functions, and from the benchmarks' result files.

    python docs/draw.py              # all, into docs/figures
    python docs/draw.py position     # one

What trains here does so in seconds, on the digits recipe.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor
from torch.nn import functional as F

import cnmix
from cnmix import kernels
from cnmix.fixed_point import BITS, FixedPoint, absmax, choose_position, dequantize
from cnmix.measures import quantization_error, update_interval
from cnmix.nn.base import QuantizedModule

ROOT = Path(__file__).resolve().parent.parent
FIGURES: dict[str, Callable[[], Figure]] = {}
"""The pictures, by the names of their files."""

# Okabe and Ito's colours, which differ for all eyes; widths differ in lightness as well.
BLUE, ORANGE, GREEN, GREY, BLACK = "#0072b2", "#d55e00", "#009e73", "#8c8c8c", "#222222"
WIDTHS = {8: "#9ecae1", 16: "#3182bd", 31: "#08306b"}
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "cnmix",  # the same file from the same numbers
    "figure.constrained_layout.use": True,
}


def picture(draw: Callable[[], Figure]) -> Callable[[], Figure]:
    """Enters a function into the pictures under its own name."""
    FIGURES[draw.__name__] = draw
    return draw


def canvas(width: float, height: float, columns: int = 1, rows: int = 1, **keywords: Any) -> tuple[Figure, Any]:
    """Returns a figure of this size in inches and its axes."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, **keywords)


def fitted(x: Tensor, bits: int) -> FixedPoint:
    """Quantizes a tensor at the position that fits it."""
    return kernels.quantize_measured(x, bits, None)[0]


def result(name: str) -> dict[str, Any]:
    """Reads a result file of the benchmarks."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


# What the library comes to.


@picture
def training_speed() -> Figure:
    """Whole training steps against eager float32."""
    networks = {
        "mlp": "MLP, 3 × 2048",
        "bert": "BERT-base, 4 layers",
        "gpt": "GPT, 6 blocks",
        "resnet18": "ResNet-18, 64 × 64",
        "mnist": "MNIST network",
    }
    arms = {"bfloat16": ("bfloat16 autocast", "#bdbdbd"), "torchao_compiled": ("torchao int8, compiled", "#7f7f7f")}
    arms |= {"cnmix_adaptive": ("cnmix O1", WIDTHS[16]), "cnmix_o3": ("cnmix O3", WIDTHS[31])}
    measured = result("training_step")["networks"]
    figure, axes = canvas(7.6, 4.3)
    for row, network in enumerate(networks):
        for place, (arm, (_, colour)) in enumerate(arms.items()):
            speed = measured[network][arm]["speedup"]
            y = row + (place - 1.5) * 0.2
            axes.barh(y, speed, 0.18, color=colour, label=arms[arm][0] if row == 0 else None)
            axes.text(speed + 0.04, y, f"{speed:.2f}", va="center", fontsize=8)
    axes.axvline(1, color=BLACK, linewidth=0.8)
    axes.set(yticks=range(len(networks)), yticklabels=networks.values(), xlim=(0, 6), xlabel="speed, eager float32 = 1")
    axes.invert_yaxis()
    axes.legend(loc="lower right")
    return figure


@picture
def inference_speed() -> Figure:
    """ResNet-50's integer inference against eager float32 and onnxruntime."""
    case = result("inference")["cases"]["ResNet-50, 16 × 3 × 224 × 224"]
    arms = {
        "float32": "eager float32",
        "bfloat16": "bfloat16 autocast, channels last",
        "ort_float32": "onnxruntime float32",
        "ort_int8": "onnxruntime int8",
        "cnmix_offline": "cnmix offline model",
        "cnmix_fused": "cnmix fused",
    }
    figure, axes = canvas(7.6, 2.6)
    for row, (arm, name) in enumerate(arms.items()):
        speed, seconds = case[arm]["speedup"], case[arm]["seconds"]["median"]
        axes.barh(row, speed, 0.62, color=WIDTHS[16] if name.startswith("cnmix") else "#bdbdbd")
        axes.text(speed + 0.1, row, f"{speed:.1f} ×  ({seconds * 1e3:.0f} ms)", va="center", fontsize=9)
        axes.text(-0.1, row, name, va="center", ha="right")
    axes.set(yticks=[], xlim=(0, 18), xlabel="speed, eager float32 = 1; 16 images of 224 × 224")
    axes.invert_yaxis()
    return figure


# The number format.


@picture
def line_of_numbers() -> Figure:
    """A few values on the lines of numbers of two positions."""
    values = torch.tensor([-1.62, -0.71, 0.055, 0.38, 1.1])
    figure, axes = canvas(7.6, 2.5)
    for row, position in enumerate((-2, -4)):
        low, high = -2.0, 2.0 - 2.0**position
        count = int((high - low) / 2.0**position) + 1
        grid = [low + step * 2.0**position for step in range(count)]
        axes.hlines(row, low, high, color=GREY, linewidth=1)
        axes.vlines(grid, row - 0.1, row + 0.1, color=GREY, linewidth=1)
        for value in values.tolist():
            nearest = round(value / 2.0**position)
            axes.annotate(
                "",
                (nearest * 2.0**position, row + 0.05),
                (value, row + 0.42),
                arrowprops={"arrowstyle": "->", "color": BLUE},
            )
            axes.text(value, row + 0.45, f"{value:g}".replace("-", "−"), ha="center", fontsize=9, color=BLUE)
            axes.text(nearest * 2.0**position, row - 0.3, f"{nearest}".replace("-", "−"), ha="center", fontsize=9)
        axes.text(-2.15, row, f"position −{-position}\nstep {2.0**position:g}", ha="right", va="center")
    axes.set(xlim=(-2.1, 2.1), ylim=(-0.45, 1.75))
    axes.axis("off")
    return figure


@picture
def position() -> Figure:
    """The position that a largest magnitude gives, and how much of the width it uses."""
    figure, (left, right) = canvas(7.6, 3.0, 2)
    magnitudes = [2 ** (exponent / 64) for exponent in range(-4 * 64, 4 * 64 + 1)]
    for bits in (8, 16):
        left.step(
            magnitudes,
            [choose_position(each, bits) for each in magnitudes],
            where="post",
            color=WIDTHS[bits],
            label=f"int{bits}",
        )
    left.set_xscale("log", base=2)
    left.set(xlabel="absmax", ylabel="position", title="the exponent of absmax decides")
    left.legend(loc="upper left")
    used = [each / 2.0 ** choose_position(each, 8) for each in magnitudes]
    right.plot(magnitudes, used, ".", markersize=2, color=BLUE)
    for bound, name in ((64, "64"), (127, "127, the largest int8")):
        right.axhline(bound, color=GREY, linewidth=0.8, linestyle="--")
        right.text(2**-4, bound + (1.5 if bound > 64 else -4), name, fontsize=8.5, color=BLACK)
    right.set_xscale("log", base=2)
    right.set(
        xlabel="absmax", ylabel="absmax in steps of int8", ylim=(50, 140), title="half of the width or more is used"
    )
    return figure


@picture
def rounding() -> Figure:
    """The four roundings, each with the library's quantizer."""
    figure, panels = canvas(7.6, 2.5, 4, sharey=True)
    x, ties = torch.linspace(-2.74, 2.74, 138), torch.arange(-2.5, 3.0)
    for axes, mode in zip(panels, ("nearest_even", "half_up", "half_away", "stochastic"), strict=True):
        if mode == "stochastic":
            draws = torch.stack([kernels.quantize(x, 8, 0, mode, seed=seed).float() for seed in range(200)])
            for row in draws[:3]:
                axes.plot(x, row, ".", markersize=1.5, color=WIDTHS[8])
            axes.plot(x, draws.mean(0), color=BLUE, linewidth=1.2, label="mean of 200")
            axes.legend(loc="upper left", fontsize=8, handlelength=1)
        else:
            axes.plot(x, kernels.quantize(x, 8, 0, mode), ".", markersize=2, color=BLUE)
            axes.plot(ties, kernels.quantize(ties, 8, 0, mode), "o", color=ORANGE, markersize=4)
        axes.set(title=mode, xlabel="x / 2^position", xticks=range(-2, 3), yticks=range(-3, 4))
        axes.grid(color="#e5e5e5")
    panels[0].set_ylabel("q")
    return figure


@picture
def ranges() -> Figure:
    """A gradient's values by exponent, and what each width holds of them."""
    gradient = trained().gradient
    position = {bits: choose_position(absmax(gradient), bits) for bits in BITS}
    nonzero = gradient[gradient != 0].abs().double()
    exponents = torch.frexp(nonzero).exponent - 1
    figure, axes = canvas(7.6, 3.2)
    low, high = max(int(exponents.min()), position[31] - 2), int(exponents.max())
    counts = [int((exponents == each).sum()) for each in range(low, high + 1)]
    axes.bar(range(low, high + 1), [count / len(nonzero) for count in counts], 0.9, align="edge", color="#bdbdbd")
    top = max(counts) / len(nonzero)
    for row, bits in enumerate(BITS):
        start = position[bits] - 1  # half a step is the least that does not become zero
        lost = float((dequantize(fitted(gradient, bits))[gradient != 0] == 0).float().mean())
        y = top * (1.1 + 0.16 * row)
        axes.hlines(y, max(start, low), high + 1, color=WIDTHS[bits], linewidth=7)
        text = f"int{bits}: {lost:.1%} of the values become zero"
        axes.text(high + 0.8, y + top * 0.045, text, ha="right", fontsize=8.5)
    axes.set(xlim=(low, high + 1.2), ylim=(0, top * 1.6), xlabel="log2 |x|", ylabel="share of the values", yticks=[])
    return figure


@picture
def way_of_a_tensor() -> Figure:
    """What happens to the operands of a product, forwards and backwards."""
    figure, axes = canvas(7.6, 3.6)
    axes.set(xlim=(-1, 101), ylim=(0, 48))
    axes.axis("off")

    def box(x: float, y: float, text: str, colour: str = "#f2f2f2", width: float = 17, height: float = 7) -> None:
        axes.add_patch(
            FancyBboxPatch(
                (x, y), width, height, boxstyle="round,pad=0.3", facecolor=colour, edgecolor=BLACK, linewidth=0.8
            )
        )
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8.5)

    def arrow(start: tuple[float, float], end: tuple[float, float], dashed: bool = False) -> None:
        style = {"arrowstyle": "-|>", "color": BLACK, "linewidth": 0.9, "linestyle": "--" if dashed else "-"}
        axes.annotate("", end, start, arrowprops=style)

    integers = "#d6e6f4"
    box(0, 38, "input\nfloat32")
    box(0, 24, "weight\nfloat32")
    box(0, 4, "grad_output\nfloat32")
    for y, name in ((38, "int8"), (24, "int8"), (4, "int8 · int16 · int31")):
        box(26, y, f"q, position\n{name}", integers, 19)
        arrow((17.6, y + 3.5), (25.5, y + 3.5))
    axes.text(21.5, 46.6, "quantize", ha="center", fontsize=8.5, style="italic")
    box(56, 31, "exact sum of\nq · q", integers)
    box(82, 31, "output\nfloat32")
    arrow((45.5, 40.5), (55.5, 36.5))
    arrow((45.5, 28), (55.5, 32.5))
    arrow((73.6, 34.5), (81.5, 34.5))
    axes.text(77.5, 40, "round once,\n× 2^(sum of positions)", ha="center", fontsize=7.5, style="italic")
    for y, name in ((15, "grad_input\nfloat32"), (1, "grad_weight\nfloat32")):
        box(56, y, "exact sum of\nq · q", integers)
        box(82, y, name)
        arrow((73.6, y + 3.5), (81.5, y + 3.5))
        arrow((45.5, 7.5), (55.5, y + 3.5))
    arrow((41, 23.5), (55.5, 19.5), dashed=True)
    axes.plot([45.5, 51.5, 51.5], [40, 36, 11], "--", color=BLACK, linewidth=0.9)
    arrow((51.5, 11), (55.5, 5.5), dashed=True)
    axes.text(100, 25.5, "dashed: the integers of the forward pass, saved", ha="right", fontsize=7.5, style="italic")
    return figure


# The adaptive algorithm.


@picture
def error_by_width() -> Figure:
    """QEM of five distributions at each width."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(2**20, generator=generator)
    wide = torch.randn(2**20, generator=generator)
    chi = torch.randn(3, 2**20, generator=generator).square().sum(0)
    tensors = {
        "normal": normal,
        "Laplace": normal.sign() * torch.empty_like(normal).exponential_(generator=generator),
        "Student t, 3 d.o.f.": normal / (chi / 3).sqrt(),
        "log-normal, σ = 2": (2 * wide).exp() * normal.sign(),
        "log-normal, σ = 3": (3 * wide).exp() * normal.sign(),
    }
    figure, axes = canvas(7.6, 3.4)
    floor = 1e-7
    for row, x in enumerate(tensors.values()):
        for place, bits in enumerate(BITS):
            error = quantization_error(x, fitted(x, bits))
            at = row + (place - 1) * 0.26
            axes.bar(
                at,
                max(error, floor) - floor / 2,
                0.24,
                bottom=floor / 2,
                color=WIDTHS[bits],
                label=f"int{bits}" if row == 0 else None,
            )
            axes.text(
                at, max(error, floor) * 1.3, f"{error:.0e}" if error >= floor else "<1e-7", ha="center", fontsize=6.5
            )
    for bound, name in ((0.03, "0.03, convolutions"), (0.01, "0.01, matrix products")):
        axes.axhline(bound, color=ORANGE, linewidth=1, linestyle="--")
        axes.text(-0.55, bound * (1.12 if bound > 0.02 else 0.5), name, fontsize=8, color=ORANGE)
    axes.set_yscale("log")
    axes.set(xticks=range(len(tensors)), xticklabels=tensors, ylabel="QEM", ylim=(floor / 2, 10), xlim=(-0.6, 4.6))
    axes.legend(loc="upper left", ncols=3, bbox_to_anchor=(0.2, 1.08))
    return figure


@picture
def intervals() -> Figure:
    """The interval as its two demands grow, and under the moving average's start at 100."""
    config = cnmix.QuantizeConfig()
    figure, (left, middle, right) = canvas(7.6, 2.8, 3)
    errors = [10 ** (-4 + step / 60) for step in range(151)]
    left.plot(errors, [update_interval(0, 0.0, error, config)[0] for error in errors], color=BLUE)
    left.set(
        xscale="log", yscale="log", xlabel="QEM", ylabel="steps until the next update", title="I2: a coarse format"
    )
    moves = [10 ** (-2 + step / 60) for step in range(151)]
    middle.plot(moves, [update_interval(0, move, 0.0, config)[0] for move in moves], color=BLUE)
    middle.set(xscale="log", yscale="log", xlabel="|position − m|", title="I1: a range that moves")
    average, steps = 100.0, []
    for _ in range(300):
        steps.append(update_interval(-7, average, 0.001, config)[0])
        average = config.alpha * -7 + (1 - config.alpha) * average
    right.plot(steps, color=BLUE)
    right.set(yscale="log", xlabel="updates so far", title="m starts at 100")
    for axes in (left, middle, right):
        axes.grid(color="#e5e5e5")
    return figure


@picture
def operand() -> Figure:
    """One operand of a real run: error, width and position."""
    seen = trained().steps
    threshold = seen[0]["threshold"]
    figure, (top, middle, bottom) = canvas(7.6, 4.6, 1, 3, sharex=True, height_ratios=[2, 1, 1])
    updates = [each for each in seen if each["updated"]]
    for bits in BITS:
        of_width = [each for each in updates if each["bits"] == bits]
        if of_width:
            top.semilogy(
                [each["step"] for each in of_width],
                [each["error"] for each in of_width],
                "o",
                markersize=4,
                color=WIDTHS[bits],
                label=f"update at int{bits}",
            )
    for each in updates:
        if each["error_before"] is not None:
            top.semilogy(each["step"], each["error_before"], "x", color=ORANGE, markersize=7, markeredgewidth=2)
            top.annotate(
                "over the threshold:\nwiden, measure again",
                (each["step"], each["error_before"]),
                (14, 6),
                textcoords="offset points",
                fontsize=8,
                color=ORANGE,
            )
    top.axhline(threshold, color=ORANGE, linewidth=1, linestyle="--")
    top.text(seen[-1]["step"], threshold * 1.2, f"threshold {threshold}", ha="right", fontsize=8, color=ORANGE)
    top.set_ylim(top=10 * threshold)
    top.set(ylabel="QEM", title=f"{trained().name}, digits recipe")
    top.legend(loc="lower right", fontsize=8)
    steps = [each["step"] for each in seen]
    middle.step(steps, [each["bits"] for each in seen], where="post", color=BLACK)
    middle.set(ylabel="bits", yticks=[8, 16], ylim=(5, 19))
    bottom.step(steps, [each["position"] for each in seen], where="post", color=BLACK)
    bottom.set(ylabel="position", xlabel="training step")
    epoch = trained().steps_per_epoch
    for axes in (top, middle, bottom):
        for end in range(epoch, len(seen), epoch):
            axes.axvline(end - 0.5, color=GREY, linewidth=0.6, linestyle=":")
    return figure


class Trained:
    """A short training run of the digits recipe, looked at through one operand.

    Attributes:
        name: of the operand.
        steps: of each training step: bits, position, error, whether it measured, and the error before it widened.
        gradient: float32, the operand's tensor on the last step.
        steps_per_epoch: training steps in an epoch.
    """

    def __init__(self, epochs: int = 4) -> None:
        spec = importlib.util.spec_from_file_location("digits", ROOT / "recipes" / "digits.py")
        assert spec is not None
        assert spec.loader is not None
        recipe = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(recipe)
        torch.manual_seed(0)
        net = recipe.Net()
        images, classes = recipe.load()[0].tensors
        self.steps_per_epoch = len(images) // 64
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
        # More updates than the default's, so that there is something to see in four epochs.
        cnmix.initialize(net, optimizer, steps_per_epoch=self.steps_per_epoch, quantify_rate=0.5)
        layer = net.fc1
        assert isinstance(layer, QuantizedModule)
        quantizer = layer.quantizers.grad_output
        self.name = "grad_output of fc1"
        self.steps: list[dict[str, Any]] = []
        seen: list[Tensor] = []
        layer.register_full_backward_pre_hook(lambda _, gradients: seen.append(gradients[0].detach()))
        for step in range(epochs * self.steps_per_epoch):
            chosen = torch.randint(len(images), (64,))
            bits, updates = quantizer.state.bits, quantizer.state.updates
            optimizer.zero_grad()
            F.cross_entropy(net(images[chosen]), classes[chosen]).backward()
            optimizer.step()
            state, threshold = quantizer.state, quantizer.config.threshold_for(quantizer.product)
            widened = state.bits > bits
            before = quantization_error(seen[-1], fitted(seen[-1], bits)) if widened else None
            self.steps.append(
                {
                    "step": step,
                    "bits": state.bits,
                    "position": state.position,
                    "error": state.error,
                    "updated": state.updates > updates,
                    "error_before": before,
                    "threshold": threshold,
                }
            )
        self.gradient = seen[-1]


_trained: list[Trained] = []


def trained() -> Trained:
    """Returns the run, which trains when it is first asked for."""
    if not _trained:
        _trained.append(Trained())
    return _trained[0]


def main(names: list[str], folder: Path = ROOT / "docs" / "figures") -> None:
    """Draws the named pictures into a folder; all where none is named."""
    torch.set_num_threads(1)
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or FIGURES:
        with mpl.rc_context(STYLE):
            FIGURES[name]().savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1:])
