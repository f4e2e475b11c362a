"""Pictures of the adaptive algorithm, made with the library's own functions."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure

import cnmix
from cnmix.fixed_point import BITS
from cnmix.measures import quantization_error, update_interval

from .common import BLACK, BLUE, GREY, ORANGE, WIDTHS, canvas, fitted, picture
from .training import trained


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
