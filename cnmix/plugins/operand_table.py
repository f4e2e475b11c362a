"""A table of the operands of a model, for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ..config import OPERANDS
from ..fixed_point import BITS
from ..nn import ModuleQuantizers
from ..operand import OperandState

if TYPE_CHECKING:
    from rich.console import Group


def operand_table(products: Mapping[str, ModuleQuantizers], max_rows: int, steps: int) -> Group:
    """Returns a table with a row for each product, and the totals below it.

    Args:
        products: their quantizers, by name.
        max_rows: products shown; the rest is summed up in a line.
        steps: optimizer steps of the run.

    Returns:
        What ``rich.print`` takes. It fits 80 columns; longer names wrap.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    states = {name: [quantizer.state for _, quantizer in each] for name, each in products.items()}
    table = Table(
        title="Operands in fixed point: width and step, 2^position",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("module", overflow="fold", min_width=8)
    for operand in OPERANDS:
        table.add_column(operand, justify="right", no_wrap=True)
    for name in ("updates", "interval", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, operands in list(states.items())[:max_rows]:
        cells = [_format(state) for state in operands]
        table.add_row(
            Text(name or "(the model)"),
            *(
                Text(cell, "bold red" if state.exceeds_max_bitwidth else "")
                for cell, state in zip(cells, operands, strict=True)
            ),
            f"{sum(state.updates for state in operands):,}",
            _range(state.interval for state in operands),
            f"{max(state.error for state in operands):.2g}",
        )
    lines = []
    rest = list(states.values())[max_rows:]
    if rest:
        others = [state for operands in rest for state in operands]
        largest = max(state.error for state in others)
        lines.append(f"and {len(rest)} more modules: {_describe(others)}; largest error {largest:.2g}")
    every = [state for operands in states.values() for state in operands]
    lines.append(f"all {len(every)} operands: {_describe(every)}")
    updates, quantized = sum(state.updates for state in every), sum(state.step for state in every)
    share = f" ({updates / quantized:.1%})" if quantized else ""
    lines.append(f"{steps:,} optimizer steps; {updates:,} updates in {quantized:,} quantizations{share}")
    exceeding = sum(state.exceeds_max_bitwidth for state in every)
    if exceeding:
        lines.append(f"! error over its threshold at max_bitwidth: {exceeding} of {len(every)} operands")
    return Group(table, *(Text(line) for line in lines))


def _format(state: OperandState) -> str:
    position = "–" if state.position is None else f"2^{state.position}"
    return f"int{state.bits} {position}{'!' if state.exceeds_max_bitwidth else ''}"


def _range(numbers: Iterable[int]) -> str:
    present = sorted(set(numbers))
    return f"{present[0]:,}" if len(present) == 1 else f"{present[0]:,}–{present[-1]:,}"


def _describe(states: list[OperandState]) -> str:
    widths = Counter(state.bits for state in states)
    return ", ".join(f"{widths[bits] / len(states):.0%} int{bits}" for bits in BITS)
