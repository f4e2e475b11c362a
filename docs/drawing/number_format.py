"""Pictures of the number format, made with the library's own functions."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from cnmix import kernels
from cnmix.fixed_point import BITS, absmax, choose_position, dequantize

from .common import BLACK, BLUE, GREY, ORANGE, WIDTHS, canvas, fitted, picture
from .training import trained


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
