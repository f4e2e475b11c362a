"""Reports of trainings: one page with everything in it, and its figures as pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..files import replacing
from ..version import __version__
from . import figures, numbers, panels, views
from .figures import Figure, save_png, to_data_uri
from .findings import findings, headline
from .numbers import Table
from .reading import find_trainings, name_apart
from .records import Operand, Training

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f'a report needs {error.name}: pip install "cnmix[inspect]"', name=error.name) from None

_SHOWN = 12
_EARLY = " Most is decided early, so the steps are on a logarithmic axis."
_MAP = "A row for each module, from left to right the steps; the larger, the darker, and white where nothing is known."


@dataclass
class Shown:
    """A figure on the page.

    Attributes:
        name: of its picture.
        title: what it shows.
        caption: how to read it.
        alternative: what it shows, in words, for those who do not see it.
        draw: returns the figure.
        tables: the numbers behind it.
    """

    name: str
    title: str
    caption: str
    alternative: str
    draw: Callable[[], Figure]
    tables: list[Table]
    source: str = ""


@dataclass
class Section:
    """A part of the page: one training, or the comparison of several."""

    label: str
    about: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Shown] = field(default_factory=list)


def write_report(
    runs: Sequence[Path],
    output: Path | None = None,
    png: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Writes what trainings logged as one HTML file that needs nothing else.

    Args:
        runs: folders of runs or of single trainings; more than one training is also compared.
        output: the file; else ``report.html`` in the folder, or for several ``comparison.html`` here.
        png: a folder for each figure as a PNG.
        report: called with a line for each training.

    Returns:
        The file.

    Raises:
        FileNotFoundError: if a folder is missing or has no telemetry.
        ValueError: if a file in it is not what cnmix writes, or ``output`` is no HTML file.
    """
    if output is None:
        output = runs[0] / "report.html" if len(runs) == 1 else Path("comparison.html")
    if output.suffix not in (".html", ".htm") or output.is_dir():
        raise ValueError(f"{output} is no name for the report: give one that ends in .html")
    sections = read_sections(runs)
    for section in sections:
        report(f"{section.label}: {len(section.figures)} figure{'s' * (len(section.figures) != 1)}")
        for shown in section.figures:
            figure = shown.draw()
            shown.source = to_data_uri(figure)
            if png is not None:
                with replacing(png / f"{section.label.replace('/', '_')}-{shown.name}.png") as file:
                    save_png(figure, file, f"{section.label}: {shown.title}")
    environment = Environment(
        loader=PackageLoader("cnmix", "telemetry"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(
        title=" · ".join(str(run) for run in runs) if len(runs) <= 3 else f"{len(runs)} runs",
        sections=sections,
        version=__version__,
    )
    with replacing(output) as file:
        file.write_text(page, encoding="utf-8")
    return output


def read_sections(runs: Sequence[Path]) -> list[Section]:
    """Returns the parts of a report: the comparison where there are several trainings, and each training."""
    trainings: list[Training] = []
    beside: list[Training | None] = []
    read: dict[Path, Training] = {}
    for run in runs:
        found, baselines = find_trainings(run)
        for each in found:
            if each.folder.resolve() not in {other.folder.resolve() for other in trainings}:
                baseline = baselines.get(each.seed)
                trainings.append(each)
                beside.append(baseline and read.setdefault(baseline.folder.resolve(), baseline))
    name_apart([*trainings, *read.values()])
    of = {each.label: baseline for each, baseline in zip(trainings, beside, strict=True) if baseline is not None}
    sections = [_compare(trainings, of)] if len(trainings) > 1 else []
    return sections + [_show(each, of.get(each.label)) for each in trainings]


def _show(training: Training, baseline: Training | None) -> Section:
    """Returns the part of one training."""
    header = training.header
    about = [str(training.folder), f"level {training.level}" if training.level else ""]
    about += [f"cnmix {header['cnmix']}"] if "cnmix" in header else []
    about += [f"torch {header['torch']}"] if "torch" in header else []
    about += [f"{header['threads']} thread{'s' * (header['threads'] != 1)}"] if "threads" in header else []
    about += [f"sampled every {header['every_n_steps']} steps"] if header.get("every_n_steps") else []
    section = Section(training.label, " · ".join(filter(None, about)), headline(training), findings(training, baseline))
    section.figures = [*_curves(training, baseline), *_maps(training), *_panels(training), *_costs(training)]
    return section


def _curves(training: Training, baseline: Training | None) -> list[Shown]:
    curves = {}
    for metric, points in training.curves.items():
        curves[metric] = {training.label: points}
        if baseline is not None and metric in baseline.curves:
            curves[metric][f"{baseline.label}, float32"] = baseline.curves[metric]
    if not curves:
        return []
    last = views.final_values(training.curves)
    ends = ", ".join(f"{metric} {numbers.write_number(value)}" for metric, value in last.items())
    return [
        Shown(
            "curves",
            "Loss and metrics",
            "The wide pale line is the float32 baseline with the same seed." if baseline is not None else "",
            f"Curves of {', '.join(curves)} over the steps. At the end: {ends}.",
            lambda: figures.curves_figure(curves),
            [numbers.curves_table(curves)],
        )
    ]


def _maps(training: Training) -> list[Shown]:
    """Returns the figures that show all operands."""
    if not training.operands:
        return []
    ranked = training.most_interesting(len(training.operands))
    early = _EARLY if views.is_logarithmic(*training.steps) else ""
    broken = [(each.module, each.operand, each.nonfinite[0]) for each in training.operands if each.nonfinite]
    found = [
        _map(
            "widths",
            "Width of each operand",
            training,
            views.width_map(training),
            numbers.widths_table(ranked),
            _MAP + early,
            headline(training)[0][1] + " at the end",
            broken,
        ),
        _map(
            "intervals",
            "Interval between updates",
            training,
            views.interval_map(training),
            numbers.intervals_table(ranked),
            "The number of steps that a decision set until the next one." + early,
        ),
        _map(
            "errors",
            "Quantization error",
            training,
            views.error_map(training),
            numbers.errors_table(ranked),
            "QEM at the width that a decision settled for, as a share of the operand's threshold." + early,
        ),
    ]
    for statistic, caption in (
        ("saturation", "The share of values at the limits of the format, at each sampled step; here on a linear axis."),
        ("underflow", "The share of values that are not zero and became zero, at each sampled step."),
    ):
        if any(each.statistics[statistic] for each in training.operands):
            most = max(each.largest(statistic) or 0.0 for each in training.operands)
            shown, table = views.share_map(training, statistic), numbers.samples_table(ranked)
            words = f"at most {numbers.write_share(most)}"
            found.append(_map(statistic, statistic.capitalize(), training, shown, table, caption, words))
    return found


def _map(
    name: str,
    title: str,
    training: Training,
    shown: views.OperandMap,
    table: Table,
    caption: str,
    words: str = "",
    nonfinite: Sequence[tuple[str, str, int]] = (),
) -> Shown:
    """Returns a figure of all operands, and says what it leaves out."""
    first, last = training.steps
    if shown.alike:
        caption += f" Not shown: {shown.alike} modules with nothing but “{shown.classes.labels[0]}”."
    if shown.left_out:
        caption += f" {shown.left_out} more modules have no room here; the numbers below have them."
    words = (
        f"{title}: map of {len(training.operands)} operands over steps {first} to {last}{'; ' * bool(words)}{words}."
    )
    return Shown(name, title, caption, words, lambda: panels.map_figure(shown, nonfinite), [table])


def _panels(training: Training) -> list[Shown]:
    """Returns the figures that show single operands, those that one should look at first."""
    ranked = training.most_interesting(len(training.operands))
    decided = [each for each in ranked if each.decisions][:_SHOWN]
    sampled = [each for each in ranked if any(one.histogram is not None for one in each.samples)][:_SHOWN]
    first, last = training.steps
    found = []
    if decided:
        found.append(
            Shown(
                "decisions",
                "Decisions and their reasons",
                "A mark is an update step: the QEM that it measured, and what came of it; hollow the widths that it "
                "tried and did not take. The ticks below say why it measured. "
                + _first_of(decided, training, "decisions"),
                f"QEM of {_names(decided)} at each decision, against the threshold.",
                lambda: panels.errors_figure(decided, first, last),
                [numbers.decisions_table(decided)],
            )
        )
    if sampled:
        found.append(
            Shown(
                "histograms",
                "Values and representable range",
                "From left to right the sampled steps, from bottom to top the magnitudes of the values; beside it the "
                "last sample. Zeros are counted, but have no place here. " + _first_of(sampled, training, "histograms"),
                f"Magnitudes of {_names(sampled)}, against the largest value and half the step of their formats.",
                lambda: panels.histograms_figure(sampled, first, last),
                [numbers.histograms_table(sampled)],
            )
        )
    return found


def _first_of(operands: Sequence[Operand], training: Training, what: str) -> str:
    count = len(training.operands)
    if len(operands) == count:
        return ""
    return f"Of {count} operands the {len(operands)} to look at first; telemetry.jsonl has the {what} of all."


def _names(operands: Sequence[Operand]) -> str:
    return ", ".join(each.name for each in operands)


def _costs(training: Training) -> list[Shown]:
    """Returns the figures of what was multiplied and how long it took."""
    found = []
    shares = views.mac_shares(training)
    if shares.steps:
        total = sum(shares.counts.values())
        words = ", ".join(f"{pair} {numbers.write_share(count / total)}" for pair, count in shares.counts.items())
        found.append(
            Shown(
                "macs",
                "Multiply-accumulates by width",
                "The share of each pair of operand widths, of the sampled steps; forward and backward.",
                f"Share of the multiply-accumulates by pair of widths. Over all samples: {words}.",
                lambda: figures.macs_figure(shares, training.steps[1]),
                [numbers.macs_table(training)],
            )
        )
    parts = views.mean_parts(training)
    if parts:
        words = ", ".join(f"{part} {1000 * seconds:.3g} ms" for part, seconds in parts.items())
        found.append(
            Shown(
                "times",
                "Time per step",
                "Sampled steps: quantize is the one pass that each operand needs, adapt what update steps do beyond "
                "it, other all the rest. The line is the mean of the steps in between, which are not sampled.",
                f"Time of the sampled steps by part, on average: {words}.",
                lambda: figures.times_figure(training),
                [numbers.times_table(training)],
            )
        )
    return found


def _compare(trainings: list[Training], baselines: dict[str, Training]) -> Section:
    """Returns the part that compares trainings."""
    section = Section("Comparison", f"{len(trainings)} trainings")
    section.tables.append(numbers.compared_table(trainings, baselines))
    metrics = dict.fromkeys(metric for training in trainings for metric in training.curves)
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {metric: {} for metric in metrics}
    for training in trainings:
        for metric, points in training.curves.items():
            curves[metric][training.label] = points
    for baseline in {id(each): each for each in baselines.values()}.values():
        for metric in metrics:
            if metric in baseline.curves:
                curves[metric][f"{baseline.label}, float32"] = baseline.curves[metric]
    names = ", ".join(training.label for training in trainings)
    if curves:
        caption = "Wide pale lines are float32 baselines." if baselines else ""
        alternative = f"Curves of {', '.join(curves)} of {names}."
        draw = lambda: figures.curves_figure(curves)  # noqa: E731
        section.figures.append(
            Shown("curves", "Loss and metrics", caption, alternative, draw, [numbers.curves_table(curves)])
        )
    widths = {"Mean width of the operands, in bits": {each.label: views.mean_widths(each) for each in trainings}}
    section.figures.append(
        Shown(
            "widths",
            "Width of the operands",
            "The plain mean over all operands; the steps are on a logarithmic axis where a training is long enough.",
            f"Curves of the mean width of the operands of {names}.",
            lambda: figures.curves_figure(widths, held=True),
            [numbers.curves_table(widths)],
        )
    )
    multiplied = [each for each in trainings if views.mac_shares(each).counts]
    if multiplied:
        section.figures.append(
            Shown(
                "macs",
                "Multiply-accumulates by width",
                "Over all sampled steps.",
                f"Share of the multiply-accumulates by pair of widths, a bar for each of {names}.",
                lambda: figures.compared_macs_figure(multiplied),
                [numbers.macs_by_training_table(multiplied)],
            )
        )
    timed = [each for each in trainings if views.mean_parts(each)]
    if timed:
        section.figures.append(
            Shown(
                "times",
                "Time per step",
                "Mean of the sampled steps.",
                f"Time of a sampled step by part, a bar for each of {names}.",
                lambda: figures.compared_times_figure(timed),
                [numbers.parts_table(timed)],
            )
        )
    different = numbers.differences_table(trainings)
    has: list[set[str]] = [{operand.name for operand in training.operands} for training in trainings]
    shared = has[0].intersection(*has[1:])
    apart = len(has[0].union(*has[1:]) - shared)
    if apart:
        section.findings.append(f"Not the same operands: {apart:,} of them are in some of the trainings only.")
    if different.rows:
        section.tables.append(different)
    elif shared:
        section.findings.append("Every operand that they share ends with the same width in all of them.")
    return section
