"""Every number that a figure shows is one that was logged."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import write_training

from cnmix.telemetry import figures, numbers, panels, views
from cnmix.telemetry.reading import read_training

MODULES = ["conv1", "layers.0.attention", "fc"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("run") / "O1-seed0"
    return write_training(place, MODULES, steps=160, steps_per_epoch=20, every=25, max_bitwidth=16)


@pytest.fixture(scope="module")
def training(folder):
    return read_training(folder)


@pytest.fixture(scope="module")
def lines(folder):
    return [json.loads(line) for line in (folder / "telemetry.jsonl").read_text().splitlines()]


def of(lines, kind, operand, training):
    return [line for line in lines if line["kind"] == kind and line["id"] == training.operands.index(operand)]


def error(line):
    return line["errors"][str(line["bits"][1])]


@pytest.mark.parametrize("name", ["width", "interval", "error"])
def test_maps_of_decisions(training, lines, name):
    shown = getattr(views, f"{name}_map")(training)
    assert shown.modules == MODULES
    assert (shown.alike, shown.left_out, shown.logarithmic) == (0, 0, True)
    assert len(shown.edges) > 20
    changed = 0
    for operand in training.operands:
        cells = shown.cells[operand.module, operand.operand]
        decisions = of(lines, "decision", operand, training)
        for start, end, cell in zip(shown.edges, shown.edges[1:], cells, strict=False):
            within = [line for line in decisions if start <= line["step"] < end]
            before = [line for line in decisions if line["step"] < start][-1:]
            if name == "width":
                expected = max(line["bits"][1] for line in within or before)
            elif name == "interval":
                expected = (within or before)[-1]["interval"]
            else:
                expected = max(error(line) for line in within or before) / operand.threshold
            assert cell == expected
        changed += len(set(cells)) > 1
    assert changed > 1


@pytest.mark.parametrize("statistic", ["saturation", "underflow"])
def test_maps_of_samples(training, lines, statistic):
    shown = views.share_map(training, statistic)
    assert shown.edges == [0, 25, 50, 75, 100, 125, 150, 160]
    for operand in training.operands:
        expected = [line[statistic] for line in of(lines, "sample", operand, training)]
        assert shown.cells[operand.module, operand.operand] == expected


def test_map_is_drawn_as_it_is(training):
    shown = views.width_map(training)
    figure = panels.map_figure(shown, [("fc", "weight", 30)])
    assert [axes.get_title("left") for axes in figure.axes] == ["input", "weight", "grad_output"]
    for axes in figure.axes:
        drawn = axes.collections[0].get_array()
        expected = [[shown.classes.of(cell) for cell in shown.cells[each, axes.get_title("left")]] for each in MODULES]
        assert np.array_equal(drawn, expected)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == MODULES
    written = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert written == {"8", "16"}
    marks = [line for line in figure.axes[1].lines if line.get_marker() == "X"]
    assert [tuple(line.get_xydata()[0]) for line in marks] == [(30.5, 2.5)]


def test_decisions_are_all_marked_with_their_reasons(training, lines):
    operands = training.operands
    figure = panels.errors_figure(operands, *training.steps)
    why = views.reasons(operands)
    assert set(why) == {line["reason"] for line in lines if line["kind"] == "decision"}
    for number, operand in enumerate(operands):
        axes, below = figure.axes[2 * number : 2 * number + 2]
        assert axes.get_title("left").startswith(operand.name)
        decisions = of(lines, "decision", operand, training)
        marked = {each.get_label(): [tuple(point) for point in each.get_offsets()] for each in axes.collections}
        for outcome in ("kept", "widened", "over"):
            expected = [(line["step"], error(line)) for line in decisions if line["outcome"] == outcome]
            assert marked.get(outcome, []) == expected
        tried = [tuple(point) for line in axes.lines if line.get_marker() == "o" for point in line.get_xydata()]
        assert tried == [
            (line["step"], each)
            for line in decisions
            for bits, each in line["errors"].items()
            if int(bits) != line["bits"][1]
        ]
        ticks = {(point[0], why[int(point[1])]) for line in below.lines for point in line.get_xydata()}
        assert ticks == {(line["step"], line["reason"]) for line in decisions}
        thresholds = [line.get_ydata()[0] for line in axes.lines if line.get_color() == figures.ALARM]
        assert thresholds == [operand.threshold]


def test_errors_of_nothing_are_drawn(training, tmp_path):
    folder = write_training(tmp_path, ["fc"], steps=10)
    text = (folder / "telemetry.jsonl").read_text()
    changed = [json.loads(line) for line in text.splitlines()]
    for number, line in enumerate(line for line in changed if line["kind"] == "decision"):
        line["errors"] = dict.fromkeys(line["errors"], (0.0, None)[number % 2])
    (folder / "telemetry.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    operands = read_training(folder).operands
    assert figures.to_data_uri(panels.errors_figure(operands, 0, 9)).startswith("data:image/svg+xml;base64,")


def test_histograms_and_ranges(training, lines):
    operands = training.operands[:3]
    figure = panels.histograms_figure(operands, *training.steps)
    for number, operand in enumerate(operands):
        axes, beside = figure.axes[2 * number : 2 * number + 2]
        samples = of(lines, "sample", operand, training)
        low = min(line["histogram"]["first"] for line in samples)
        drawn = axes.collections[0].get_array()
        for column, line in enumerate(samples):
            counts, first = line["histogram"]["counts"], line["histogram"]["first"]
            total = sum(counts) + line["histogram"]["zeros"]
            expected = np.zeros(len(drawn))
            expected[first - low : first - low + len(counts)] = [count / total for count in counts]
            assert np.allclose(drawn[:, column], expected)
        top, bottom = (line.get_ydata()[:-1].tolist() for line in axes.lines)
        assert top == [line["position"] + line["bits"] - 1 for line in samples]
        assert bottom == [line["position"] - 1 for line in samples]
        assert np.allclose([bar.get_width() for bar in beside.patches], drawn[:, -1])
        held = [bar.get_facecolor() for bar in beside.patches]
        inside = [bottom[-1] <= low + row < top[-1] for row in range(len(drawn))]
        assert len(set(zip(held, inside, strict=True))) == len(set(inside))


def test_multiply_accumulates(training, lines):
    shares = views.mac_shares(training)
    times = [line for line in lines if line["kind"] == "time"]
    assert list(shares.shares) == ["8×8", "8×16", "16×16"][: len(shares.shares)]
    for column, line in enumerate(times):
        total = sum(line["macs"].values())
        expected = {pair.replace("x", "×"): count / total for pair, count in line["macs"].items()}
        assert {pair: each[column] for pair, each in shares.shares.items() if each[column]} == pytest.approx(expected)
    figure = figures.macs_figure(shares, training.steps[1])
    tops = [line.get_ydata()[:-1] for line in figure.axes[0].lines]
    assert np.allclose(tops, np.cumsum(list(shares.shares.values()), axis=0))
    assert np.allclose(tops[-1], 1)


def test_times(training, lines):
    figure = figures.times_figure(training)
    bars = {container.get_label(): [bar.get_height() for bar in container] for container in figure.axes[0].containers}
    times = [line for line in lines if line["kind"] == "time"]
    assert bars == {part: pytest.approx([1000 * line[part] for line in times]) for part in views.PARTS}
    drawn = [line.get_xydata() for line in figure.axes[0].lines if len(line.get_xydata())]
    between = [line for line in lines if line["kind"] == "steps"]
    for points, line in zip(drawn, between, strict=True):
        level = 1000 * line["seconds"] / (line["last"] - line["first"] + 1)
        assert points.tolist() == [pytest.approx([line["first"], level]), pytest.approx([line["last"], level])]


def test_a_slow_first_step_leaves_the_others_their_height(tmp_path):
    folder = write_training(tmp_path, ["fc"], steps=160)
    training = read_training(folder)
    first = training.times[0]
    for part in first.parts:
        first.parts[part] *= 100
    axes = figures.times_figure(training).axes[0]
    assert axes.get_ylim()[1] < 40
    assert [text.get_text() for text in axes.texts] == [f"↑ {1000 * sum(first.parts.values()):.3g}"]


def test_curves(training, folder):
    curves = {metric: {"O1": points, "O0, float32": points} for metric, points in training.curves.items()}
    figure = figures.curves_figure(curves)
    rows = [row.split(",") for row in (folder / "metrics.csv").read_text().splitlines()[1:]]
    for axes, column in zip(figure.axes, (2, 3, 4), strict=True):
        expected = [(int(row[1]), float(row[column])) for row in rows if row[column]]
        assert [[tuple(point) for point in line.get_xydata()] for line in axes.lines] == [expected, expected]


def test_curves_are_told_apart_without_colour():
    points = [(step, 1.0 + step) for step in range(100)]
    labels = [f"O{number}" for number in range(4)] + ["a, float32", "b, float32"]
    lines = figures.curves_figure({"loss": dict.fromkeys(labels, points)}).axes[0].lines
    assert len({(line.get_linestyle(), line.get_linewidth()) for line in lines}) == len(labels)
    # A baseline of a single point is seen, and so is that a metric is nowhere finite.
    axes = figures.curves_figure({"loss": {"O0, float32": [(9, 1.0)], "O1": [(9, math.nan)]}}).axes[0]
    assert axes.lines[0].get_marker() not in ("", "None")
    axes = figures.curves_figure({"loss": {"O1": [(9, math.nan)]}}).axes[0]
    assert [text.get_text() for text in axes.texts] == ["NaN or infinity throughout"]
    # Of values that hold, a line does not slope.
    (line,) = figures.curves_figure({"bits": {"O1": points}}, held=True).axes[0].lines
    assert line.get_drawstyle() == "steps-post"


def test_axes_are_of_the_steps_that_there_were(training):
    first, last = training.steps
    for axes in panels.histograms_figure(training.operands[:2], first, last).axes[::2]:
        assert axes.get_xlim() == (first, last + 1)
        low, high = axes.get_ylim()
        assert all(low < limit < high for line in axes.lines for limit in line.get_ydata())
    assert figures.times_figure(training).axes[0].get_xlim()[0] > first - 5


def test_widths_that_go_up_and_down(training):
    operand = dataclasses.replace(training.operands[0])
    each = operand.decisions[0]
    operand.decisions = [
        dataclasses.replace(each, step=step, bits=((8, 16), (16, 8))[step % 2]) for step in range(1000)
    ]
    assert numbers.write_widths(operand) == "int8 → int16 at 0 → int8 at 1 → int16 at 2 → 996 more → int8 at 999"
    assert len(numbers.write_widths(operand, with_steps=False)) < 60


def test_mean_widths(training, lines):
    for step, mean in views.mean_widths(training):
        widths = [8] * 9
        for line in lines:
            if line["kind"] == "decision" and line["step"] <= step:
                widths[line["id"]] = line["bits"][1]
        assert mean == sum(widths) / 9


def test_comparisons(training):
    axes = figures.compared_times_figure([training, training]).axes[0]
    parts = views.mean_parts(training)
    assert [bar.get_width() for bar in axes.patches[:4]] == pytest.approx([1000 * parts[part] for part in views.PARTS])
    axes = figures.compared_macs_figure([training]).axes[0]
    counts = views.mac_shares(training).counts
    expected = [count / sum(counts.values()) for count in counts.values()]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(expected)


@given(first=st.integers(0, 200), length=st.integers(1, 10**6))
def test_columns_cover_the_steps(first, length):
    edges = views.column_edges(first, first + length - 1)
    assert edges == sorted(set(edges))
    assert (edges[0], edges[-1]) == (first, first + length)
    assert len(edges) <= 122


def test_large_models_leave_out_what_is_quiet(tmp_path):
    training = read_training(write_training(tmp_path, [f"layers.{n}.fc" for n in range(130)], steps=3, every=100))
    for operand in training.operands[30:]:
        operand.decisions.clear()
    shown = views.error_map(training)
    busy = {
        module
        for (module, _), row in shown.cells.items()
        if any(cell is not None and shown.classes.of(cell) for cell in row)
    }
    assert len(busy) <= 10
    assert set(shown.modules) >= busy
    assert len(shown.modules) + shown.alike + shown.left_out == 130
    assert shown.modules == sorted(shown.modules, key=lambda name: int(name.split(".")[1]))
    for operand in training.operands:
        operand.nonfinite.append(1)
    everything = views.width_map(training)
    assert len(everything.modules) <= 120


def test_greyscale_keeps_the_order():
    def lightness(shade):
        red, green, blue = (int(shade[start : start + 2], 16) / 255 for start in (1, 3, 5))
        return 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2

    grey = [116 * lightness(shade) ** (1 / 3) - 16 for shade in figures.SHADES]
    assert all(light - dark > 12 for light, dark in itertools.pairwise(grey))
    looks = figures.pair_looks(["8×8", "8×16", "16×16", "8×31", "16×31", "31×31"])
    assert len({(look["facecolor"], look["hatch"]) for look in looks.values()}) == 6


def test_classes():
    assert [views.WIDTHS.of(bits) for bits in (8, 16, 31)] == [0, 1, 2]
    assert [views.INTERVALS.of(steps) for steps in (1, 2, 9, 10, 1000)] == [0, 1, 1, 2, 4]
    assert [views.ERRORS.of(ratio) for ratio in (0, 0.01, 0.99, 1, 1.01)] == [0, 1, 3, 3, 4]
    assert [views.SHARES.of(share) for share in (0, 1e-9, 0.001, 0.1)] == [0, 1, 2, 4]
    for classes in (views.WIDTHS, views.INTERVALS, views.ERRORS, views.SHARES):
        assert len(classes.labels) == len(classes.letters) == len(classes.bounds) + 1


def test_long_curves_become_means():
    points = [(step, float(step % 2)) for step in range(1000)]
    thin = views.thinned(points)
    assert len(thin) <= 400
    assert math.isclose(sum(y for _, y in thin) / len(thin), 0.5, abs_tol=0.01)
    assert views.thinned(points[:10]) == points[:10]


def test_names_that_are_too_long():
    assert panels.shorten("short.name") == "short.name"
    assert panels.shorten("encoder.layers.11.self_attention.output", 20) == "encoder…ntion.output"
    assert len(panels.shorten("a" * 100, 33)) == 33


def test_tables_have_the_numbers(training, lines):
    decisions = [line for line in lines if line["kind"] == "decision"]
    table = numbers.decisions_table(training.operands)
    assert sum(int(row[6]) for row in table.rows) == len(decisions)
    updates = {(row[0], row[1]): int(row[2]) for row in numbers.intervals_table(training.operands).rows}
    assert updates == {(each.module, each.operand): len(each.decisions) for each in training.operands}
    histograms = numbers.histograms_table(training.operands).rows
    last = of(lines, "sample", training.operands[0], training)[-1]["histogram"]
    assert histograms[0][-1] == f"from 2^{last['first']}: {' '.join(map(str, last['counts']))}"
    assert [row[0] for row in numbers.macs_table(training).rows] == ["0", "25", "50", "75", "100", "125", "150"]
    assert numbers.write_share(0.1234) == "12.3 %"
    assert numbers.write_share(None) == "–"
    assert numbers.write_share(300.0) == "30,000 %"
    assert numbers.write_end(0.5, 0.5012) == "0.5 (−0.0012)"
    assert [numbers.write_end(0.5, other) for other in (None, math.nan)] == ["0.5", "0.5"]
    assert numbers.write_end(math.nan, 0.5) == "NaN"
