import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from synthetic_run import write_training
from torch import nn

import cnmix
from cnmix.nn import quantizer_sets
from cnmix.recipe import load_recipe
from cnmix.telemetry import report as reports
from cnmix.telemetry.reading import find_trainings
from cnmix.telemetry.report import read_sections, write_report
from cnmix.training import run_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
MODULES = ["conv1", "fc"]
FIGURES = [
    "curves",
    "widths",
    "intervals",
    "errors",
    "saturation",
    "underflow",
    "decisions",
    "histograms",
    "macs",
    "times",
]
COMPARED = ["curves", "widths", "macs", "times"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves out what takes long, for tests that do not look at the figures."""
    monkeypatch.setattr(reports, "to_data_uri", lambda figure: "data:,")


class Page(HTMLParser):
    """What is on a page: elements with their attributes, and the text."""

    def __init__(self, file):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(Path(file).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    write_training(folder / "O1-seed0", MODULES, steps=60, steps_per_epoch=20, every=25)
    write_training(folder / "O0-seed0", [], steps=60, steps_per_epoch=20, level="O0")
    return folder


@pytest.fixture(scope="module")
def page(run):
    return write_report([run])


def test_a_page_with_everything(run, page):
    assert page == run / "report.html"
    found = Page(page)
    assert [each["id"] for each in found.all("figure")] == [f"part-1-{name}" for name in FIGURES]
    images = found.all("img")
    assert len(images) == len(FIGURES)
    for each in images:
        assert each["src"].startswith("data:image/svg+xml;base64,")
        assert len(each["alt"]) > 20
    assert len(found.all("details")) == len(FIGURES)
    assert len(found.all("table")) == len(FIGURES)
    assert {each["href"] for each in found.all("a")} == {f"#part-1-{name}" for name in FIGURES}
    for sentence in (
        "At the end test_accuracy",
        "updates in 60 steps",
        "A step takes 11.5 ms",
        "in brackets the difference",
    ):
        assert sentence in found.text
    assert page.stat().st_size < 2_000_000


def test_the_page_needs_nothing_else(page):
    text = page.read_text(encoding="utf-8")
    text += "".join(base64.b64decode(each).decode() for each in re.findall(r"svg\+xml;base64,([^\"]+)", text))
    addresses = set(re.findall(r"https?://[^\"'\s<>]+", text))
    assert addresses <= {  # names of formats
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
        "http://creativecommons.org/ns#",
        "http://purl.org/dc/elements/1.1/",
        "http://purl.org/dc/dcmitype/StillImage",
        "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd",
        "https://matplotlib.org/",
    }
    assert not {"src", "href"} & {name for each in Page(page).all("script") + Page(page).all("link") for name in each}
    assert "default-src 'none'" in text


def browse(page, tmp_path, code):
    """Returns what a script in the page returns, and what the browser's console says."""
    copy = tmp_path / "opened.html"
    script = f"addEventListener('load', () => document.body.dataset.found = JSON.stringify(({code})()))"
    copy.write_text(
        page.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1200,900"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--disable-dev-shm-usage", "--virtual-time-budget=20000"]
    command = [CHROMIUM, *options, "--dump-dom", copy.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = [each for each in _attributes(ended.stdout) if "data-found" in each]
    return json.loads(found[0]["data-found"]), [line for line in ended.stderr.splitlines() if "CONSOLE" in line]


def _attributes(text):
    parser = HTMLParser()
    found = []
    parser.handle_starttag = lambda tag, attrs: found.append(dict(attrs))
    parser.feed(text)
    return found


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_in_a_browser(page, tmp_path):
    code = """() => {
        const field = document.querySelector("input[type=search]");
        field.value = "grad_output"; field.dispatchEvent(new Event("input"));
        const rows = [...field.nextElementSibling.querySelectorAll("tbody tr")];
        return {
            widths: [...document.images].map(each => each.complete ? each.naturalWidth : 0),
            wider: document.documentElement.scrollWidth > innerWidth,
            shown: rows.filter(each => !each.hidden).length, rows: rows.length,
        };
    }"""
    found, console = browse(page, tmp_path, code)
    assert not console
    assert len(found["widths"]) == len(FIGURES)
    assert all(width > 500 for width in found["widths"])
    assert not found["wider"]
    assert 0 < found["shown"] < found["rows"]
    # The same way shows an error where there is one.
    code = "() => { console.error('seen'); fetch('https://example.org/x').catch(() => {}); return 1; }"
    _, console = browse(page, tmp_path, code)
    assert any("seen" in line for line in console)
    assert any("Content Security Policy" in line for line in console)


def test_comparison(run, undrawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other"
    write_training(other / "O1-seed0", MODULES, steps=60, steps_per_epoch=20, every=25, seed=5, max_bitwidth=8)
    lines = []
    page = write_report([run, other, run], report=lines.append)
    assert page == Path("comparison.html")
    assert lines == [
        f"Comparison: {len(COMPARED)} figures",
        f"digits/O1-seed0: {len(FIGURES)} figures",
        f"other/O1-seed0: {len(FIGURES)} figures",
    ]
    sections = read_sections([run, other])
    rows = sections[0].tables[0].rows
    assert [row[0] for row in rows] == ["digits/O1-seed0", "other/O1-seed0"]
    assert re.search(r"\([+−]\d", rows[0][1])  # the difference from the baseline, which the other has not
    assert "(" not in rows[1][1]
    assert "6 int8" in rows[1][4]
    different = sections[0].tables[1]
    assert different.headings[1:] == ["digits/O1-seed0", "other/O1-seed0"]
    assert all(row[1] != row[2] == "int8" for row in different.rows)


def test_trainings_of_a_run_are_compared(run, tmp_path):
    for level in ("O1", "O2"):
        write_training(tmp_path / f"{level}-seed0", ["fc"], steps=30, level=level)
    assert [each.label for each in read_sections([tmp_path])] == ["Comparison", "O1-seed0", "O2-seed0"]


def test_a_run_of_a_recipe(tmp_path, undrawn):
    settings = ["seeds=[0]", "epochs=2", "threads=1", "model.args.channels=2", "batch_size=256", f"output={tmp_path}"]
    recipe = load_recipe(RECIPES / "digits.yaml", [*settings, "telemetry.every_n_steps=4"])
    folder, _, model = run_recipe(recipe, "digits", compare=True, progress=False)
    (training,), baselines = find_trainings(folder)
    assert (training.level, training.seed, list(baselines)) == ("O1", "0", ["0"])
    states = {
        (fqn, name): quantizer.state for fqn, quantizers in quantizer_sets(model) for name, quantizer in quantizers
    }
    assert {(each.module, each.operand) for each in training.operands} == set(states)
    for each in training.operands:
        state, last = states[each.module, each.operand], each.decisions[-1]
        assert (each.last_bits, len(each.decisions)) == (state.bits, state.updates)
        assert (last.position[1], last.error, last.interval) == (state.position, state.error, state.interval)
        assert [sample.step for sample in each.samples] == [0, 4, 8]
        assert all(sample.histogram.total > 0 for sample in each.samples)
    assert [each.step for each in training.times] == [0, 4, 8]
    page = Page(write_report([folder]))
    assert [each["id"] for each in page.all("figure")] == [f"part-1-{name}" for name in FIGURES]
    assert "the difference from float32" in page.text


def test_findings(tmp_path):
    folder = write_training(tmp_path / "O1-seed0", ["fc"], steps=60, max_bitwidth=8, curves=False)
    with open(folder / "telemetry.jsonl", "a") as file:
        file.write('{"kind": "nonfinite", "id": 2, "step": 7}\n{"kind": "nonfinite", "id": 1, "step": 9}\n{"kind')
    (section,) = read_sections([folder])
    said = "\n".join(section.findings)
    assert "NaN or infinity in 2 of 3 operands, the first in fc.grad_output (step 7) and fc.weight (step 9)." in said
    assert "No operand was widened: int8 throughout." in said
    assert "One line of telemetry.jsonl could not be read" in said
    assert "test_accuracy" not in said
    assert section.facts[0][0] == "operands at the end"
    assert [each.name for each in section.figures] == FIGURES[1:]


def test_a_training_that_diverged(tmp_path):
    folder = write_training(tmp_path / "O1-seed0", ["fc", "frozen"], steps=60)
    write_training(tmp_path / "O0-seed0", [], steps=60, level="O0")
    lines = [json.loads(line) for line in (folder / "telemetry.jsonl").read_text().splitlines()]
    lines = [{**line, "first_step": 5} if line["kind"] == "run" else line for line in lines]
    idle = [line for line in lines if not (line["kind"] in ("decision", "sample") and line["id"] >= 3)]
    (folder / "telemetry.jsonl").write_text("".join(json.dumps(line) + "\n" for line in idle))
    rows = (folder / "metrics.csv").read_text().splitlines()
    (folder / "metrics.csv").write_text("\n".join([*rows[:-1], "1,43,,,nan"]) + "\n")
    (section,) = read_sections([folder])
    said = "\n".join(section.findings)
    assert "and train_loss NaN; in brackets the difference from float32." in said
    assert "train_loss is NaN or infinite in 1 of 2 values, first at step 43." in said
    assert "Never measured: 3 of 6 operands: frozen.input, frozen.weight and frozen.grad_output." in said
    assert "It begins at step 5:" in said
    assert reports.to_data_uri(section.figures[0].draw())


def test_comparison_of_different_networks(tmp_path):
    folders = [write_training(tmp_path / name, [name, "fc"], steps=5, curves=False) for name in ("one", "two")]
    section = read_sections(folders)[0]
    assert section.findings[0] == "Not the same operands: 6 of them are in some of the trainings only."
    assert all(row[0].startswith("fc.") for table in section.tables[1:] for row in table.rows)


def test_a_training_of_which_little_is_known(undrawn, tmp_path):
    folder = write_training(tmp_path / "O1-seed0", ["fc"], steps=60, curves=False)
    kept = [
        line
        for line in (folder / "telemetry.jsonl").read_text().splitlines()
        if json.loads(line)["kind"] in ("run", "operand")
    ]
    (folder / "telemetry.jsonl").write_text("\n".join(kept) + "\n")
    page = Page(write_report([folder]))
    assert [each["id"] for each in page.all("figure")] == ["part-1-widths", "part-1-intervals", "part-1-errors"]


def test_names_are_text(tmp_path, undrawn):
    module = "<b>&amp;$\\frac$"
    folder = write_training(tmp_path / "<i>run", [module], steps=5)
    page = Page(write_report([folder]))
    assert not page.all("b")
    assert not page.all("i")
    assert module in page.text
    for shown in read_sections([folder])[0].figures[1:2]:
        reports.save_png(shown.draw(), tmp_path / "a.png", module)  # refuses what it takes for a formula and is none


def test_large_models_make_bounded_pages(tmp_path):
    modules = [f"encoder.layers.{number // 6}.{number % 6}.projection" for number in range(400)]
    folder = write_training(tmp_path / "O1-seed0", modules, steps=4, every=100)
    (section,) = read_sections([folder])
    for shown in section.figures:
        assert all(len(table.rows) <= 1000 for table in shown.tables)
    assert "200 further rows are left out" in section.figures[1].tables[0].note
    figure = section.figures[1].draw()
    assert figure.get_size_inches()[1] < 16
    assert len(reports.to_data_uri(figure)) < 500_000


def test_command(run, undrawn, tmp_path, command):
    page, folder = tmp_path / "page.html", tmp_path / "png"
    code, output, error = command("inspect", run / "O1-seed0", "--output", page, "--png", folder)
    assert (code, error) == (0, "")
    for line in (f"O1-seed0: {len(FIGURES)} figures", f"Kept in {page}", f"Figures in {folder}"):
        assert line in output
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"O1-seed0-{name}.png" for name in FIGURES)
    for path in folder.iterdir():
        with Image.open(path) as image:
            assert image.width == 1560
            darkest, lightest = image.convert("L").getextrema()
        assert darkest < 60
        assert lightest == 255
    # The seed's float baseline is beside the training.
    assert "O0-seed0" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing is no folder"),
        (["."], r"has no telemetry\.jsonl of a training: cnmix train writes one"),
        (["--output", "telemetry.jsonl", "."], r"telemetry\.jsonl is no name for the report"),
    ],
)
def test_command_refuses(tmp_path, command, arguments, message):
    code, _, error = command("inspect", *arguments)
    assert code == 2
    assert re.fullmatch(rf"error: .*{message}.*", error.strip())
    assert not list(tmp_path.iterdir())


def test_operands_that_were_all_zeros(tmp_path, undrawn):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    cnmix.initialize(model, optimizer, steps_per_epoch=4)
    with cnmix.telemetry.record(model, tmp_path / "zeros", every_n_steps=1) as recorder:
        for scale in (1, 1, 0):
            optimizer.zero_grad()
            model(scale * torch.ones(4, 8)).square().mean().backward()
            optimizer.step()
            recorder.step()
    page = Page(write_report([tmp_path / "zeros"]))
    assert "0.input" in page.text
