"""What the benchmarks share: the machine's description, interleaved timing, a table, JSON and a bar plot."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchao", "onnx", "onnxruntime", "numpy", "cnmix")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx_vnni", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")
ENVIRONMENT = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "THP_MEM_ALLOC_ENABLE", "OMP_", "KMP_", "MKL_", "ONEDNN_")


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat of one arm, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the repeats."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper quartile (the value itself where there is one repeat)."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        lower, _, upper = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return lower, upper

    def to_dict(self) -> dict[str, Any]:
        """Returns median, quartiles and every repeat, in seconds."""
        lower, upper = self.quartiles
        return {"median": self.median, "lower": lower, "upper": upper, "seconds": list(self.seconds)}


@dataclass(frozen=True)
class Bar:
    """One bar of the plot.

    Attributes:
        name: label on the axis.
        value: length, or None where there is no result.
        label: text after the bar.
        lower: lower end of the whisker.
        upper: upper end of the whisker.
        highlight: whether it is ours rather than a peer.
    """

    name: str
    value: float | None
    label: str = ""
    lower: float | None = None
    upper: float | None = None
    highlight: bool = False


def time_arms(
    arms: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1, settle: float | None = None
) -> dict[str, Timing]:
    """Times named arms in interleaved rounds: one call of each per round, so that a slow minute slows all of them.

    Every round starts one arm later than the last, so none always follows the same neighbour's caches first.

    Args:
        arms: what to time, by name.
        repeats: timed rounds.
        warmup: rounds before them that are not timed.
        settle: seconds to sleep before each arm's turn, and a call then that is not timed. For arms with threads of
            their own: an idle pool spins for a while, on the cores that the next arm needs.

    Returns:
        The timing of each arm, by name.
    """
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-warmup, repeats):
        start = index % len(names) if names else 0
        for name in names[start:] + names[:start]:
            if settle is not None:
                time.sleep(settle)
                arms[name]()
            begin = time.perf_counter()
            arms[name]()
            elapsed = time.perf_counter() - begin
            if index >= 0:
                seconds[name].append(elapsed)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def machine() -> dict[str, Any]:
    """Describes the machine: processor, cores, threads, versions, allocator settings and the load of the moment."""
    info = _cpu_info()
    flags = set(info.get("flags", "").split())
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cpu_family_model_stepping": "/".join(info.get(key, "?") for key in ("cpu family", "model", "stepping")),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}".strip(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(ENVIRONMENT)},
    }


def begin(benchmark: str, **more: Any) -> dict[str, Any]:
    """Prints what machine this is; returns what a result begins with, and ``more`` behind it."""
    found = machine()
    print(describe(found))
    return {"benchmark": benchmark, "machine": found, **more}


def describe(found: Mapping[str, Any]) -> str:
    """Returns what ``machine`` found as two or three lines of text."""
    versions = ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version)
    settings = " ".join(f"{name}={value}" for name, value in found["environment"].items()) or "default allocator"
    return (
        f"{found['cpu']} ({', '.join(found['flags']) or found['cpu_capability']})\n"
        f"{found['cores']} cores, {found['threads']} threads, load {found['load_average']}; "
        f"{versions}, Python {found['python']}; {settings}"
    )


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None = None) -> None:
    """Prints a table; the first column is aligned left, the last wraps, the others are aligned right.

    Args:
        title: the line above.
        columns: headings.
        rows: cells, as many in each row as there are columns.
        caption: the line below.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=170)
    printed = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        edge = index in (0, len(columns) - 1)
        printed.add_column(column, justify="left" if edge else "right", no_wrap=index < len(columns) - 1)
    for row in rows:
        printed.add_row(*map(escape, row))
    console.print(printed)


def save_json(path: str | os.PathLike[str], result: Mapping[str, Any]) -> Path:
    """Writes ``result`` to ``path``, making its folder; a file that is there is replaced whole, never left half."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(target.name + ".part")
    draft.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return draft.replace(target)


def plot(
    path: str | os.PathLike[str],
    title: str,
    panels: Mapping[str, Sequence[Bar]],
    xlabel: str,
    reference: float | None = None,
) -> Path | None:
    """Draws one panel of horizontal bars per key of ``panels``, from top to bottom, into a PNG or SVG.

    Args:
        path: the picture; its suffix chooses the format.
        title: the line above all panels.
        panels: bars by the panel's title.
        xlabel: name of the values.
        reference: where a vertical line is drawn, if anywhere.

    Returns:
        The path, or None where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    heights = [len(bars) for bars in panels.values()]
    figure = Figure(figsize=(9, 0.6 + sum(0.27 * height + 0.75 for height in heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (name, bars) in zip(axes, panels.items(), strict=True):
        values = [bar.value or 0.0 for bar in bars]
        places = range(len(bars))
        axis.barh(places, values, color=["#c8553d" if bar.highlight else "#8da9c4" for bar in bars])
        widest = max([1e-9, *values, *(bar.upper or 0.0 for bar in bars)])
        for place, bar in zip(places, bars, strict=True):
            if bar.value is not None and bar.lower is not None and bar.upper is not None:
                axis.plot([bar.lower, bar.upper], [place, place], color="#333333", linewidth=1.2)
            end = max(bar.value or 0.0, bar.upper or 0.0)
            axis.text(end + 0.01 * widest, place, bar.label, va="center", fontsize=8)
        if reference is not None:
            axis.axvline(reference, color="#333333", linewidth=0.8, linestyle=":")
        axis.set_yticks(list(places), [bar.name for bar in bars], fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.35 * widest)
        axis.set_title(name, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel(xlabel, fontsize=9)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)
    return target


def _cpu_info() -> dict[str, str]:
    """Returns the first processor's entries of /proc/cpuinfo, or nothing on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n", 1)[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
