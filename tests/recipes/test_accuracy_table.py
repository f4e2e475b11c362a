import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "digits": ["epochs=1", "model.args.channels=1", "batch_size=512"],
    "yolov3": [
        *("model.width=0.01", "model.image_size=64", "data.train_images=16", "data.test_images=2"),
        *("epochs=1", "batch_size=8"),
    ],
}


def rows_of(**scores):
    """Returns rows of (float32, O1) by seed, for each recipe."""
    return [
        {"recipe": name, "level": level, "seed": seed, "settings": "", "score": score, "seconds": 1.0}
        for name, both in scores.items()
        for seed, pair in enumerate(both)
        for level, score in zip(("O0", "O1"), pair, strict=True)
        if score is not None
    ]


def test_table(accuracy):
    rows = rows_of(digits=[(0.5, 0.6), (0.7, 0.6), (0.6, None)], crnn=[(0.9, 0.92)])
    lines = accuracy.markdown(rows).splitlines()
    assert lines[2:4] == [
        "| crnn | words right | 1 | 90.00 (90.00 … 90.00) | 92.00 (92.00 … 92.00) | +2.00 (+2.00 … +2.00) |",
        "| digits | classes right | 2 | 60.00 (50.00 … 70.00) | 60.00 (60.00 … 60.00) | +0.00 (-10.00 … +10.00) |",
    ]
    assert lines[5] == (
        "Over the 2 recipes the change of the mean score is +1.00 points on average, from +0.00 (digits) to +2.00 "
        "(crnn); of the 3 pairs of single runs, from -10.00 to +10.00."
    )
    assert len(accuracy.markdown([]).splitlines()) == 2


def test_every_recipe_is_there(accuracy):
    assert {"crnn", "digits", "mnist", "resnet50", "text", "vgg19", "yolov3"} <= set(accuracy.recipe_names())
    for name in accuracy.recipe_names():
        assert accuracy.fingerprint(name) == accuracy.fingerprint(name)
        assert (accuracy.settings_of(name) == ["--tiny"]) == (name not in ("digits", "text", "yolov3"))


def test_page_has_the_numbers_of_the_file(accuracy):
    rows = json.loads(accuracy.OUTPUT.read_text())["rows"]
    page = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    assert f"{accuracy.BEGIN}\n\n{accuracy.markdown(rows)}\n\n{accuracy.END}" in page


@pytest.mark.parametrize("name", ["digits", "yolov3"])
def test_a_run(accuracy, monkeypatch, name):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(accuracy, "settings_of", SMALL.get)
    row = accuracy.train((name, "O1", 3), threads=1, limit=300)
    assert {key: row[key] for key in ("recipe", "level", "seed")} == {"recipe": name, "level": "O1", "seed": 3}
    assert 0 <= row["score"] <= 1
    assert row["seconds"] > 0


def test_a_run_that_fails(accuracy, monkeypatch):
    monkeypatch.setattr(accuracy, "settings_of", lambda name: ["epoch=1"])
    with pytest.raises(RuntimeError, match="error: epoch=1: Key 'epoch'"):
        accuracy.train(("yolov3", "O1", 0), threads=1, limit=300)
    with pytest.raises(RuntimeError, match="took more than 0 s"):
        accuracy.train(("digits", "O1", 0), threads=1, limit=0.01)


class TestMain:
    @pytest.fixture
    def run(self, accuracy, monkeypatch, tmp_path, capsys):
        (tmp_path / "page.md").write_text(f"Before.\n\n{accuracy.BEGIN}\n\nold\n\n{accuracy.END}\n\nAfter.\n")

        def train(run, threads, limit):
            trained.append(run)
            if run in fails:
                raise RuntimeError("out of luck")
            name, level, seed = run
            scored = {"score": 0.5 + 0.1 * seed, "seconds": 1.0, "settings": accuracy.fingerprint(name)}
            return {"recipe": name, "level": level, "seed": seed, **scored}

        def main(*arguments):
            trained.clear()
            places = ["--output", str(tmp_path / "rows.json"), "--page", str(tmp_path / "page.md")]
            monkeypatch.setattr(sys, "argv", ["recipes_accuracy.py", "--recipes", "digits", *arguments, *places])
            code = accuracy.main()
            return code, sorted(trained), (tmp_path / "page.md").read_text(), capsys.readouterr().out

        trained, main.fails = [], set()
        fails = main.fails
        monkeypatch.setattr(accuracy, "train", train)
        return main

    def test_goes_on(self, run):
        code, trained, page, _ = run("--seeds", "0")
        assert (code, trained) == (0, [("digits", "O0", 0), ("digits", "O1", 0)])
        assert page.startswith("Before.\n")
        assert page.endswith("\nAfter.\n")
        assert "| digits | classes right | 1 | 50.00 (50.00 … 50.00)" in page
        assert "old" not in page
        code, trained, page, _ = run("--seeds", "0", "1", "--processes", "2")
        assert (code, trained) == (0, [("digits", "O0", 1), ("digits", "O1", 1)])
        assert "| digits | classes right | 2 | 55.00 (50.00 … 60.00)" in page
        assert run("--seeds", "0", "1")[1] == []

    def test_what_failed_is_run_again(self, run):
        run.fails.add(("digits", "O1", 0))
        code, _, _, printed = run("--seeds", "0")
        assert code == 1
        assert "digits, O1, seed 0 failed: out of luck" in printed
        run.fails.clear()
        assert run("--seeds", "0")[:2] == (0, [("digits", "O1", 0)])

    def test_other_settings_are_run_again(self, accuracy, run, monkeypatch):
        run("--seeds", "0")
        monkeypatch.setattr(accuracy, "fingerprint", lambda name: f"other {name}")
        assert len(run("--seeds", "0")[1]) == 2

    def test_a_page_without_marks(self, accuracy, tmp_path):
        (tmp_path / "page.md").write_text("No table here.")
        with pytest.raises(ValueError, match=r"page.md lacks the lines <!-- begin"):
            accuracy.write_page(tmp_path / "page.md", "table")
