"""``cnmix train`` records by default."""

import json
from pathlib import Path

import pytest

from cnmix.recipe import load_recipe
from cnmix.training import run_recipe

DIGITS = Path(__file__).resolve().parents[2] / "recipes" / "digits.yaml"
SMALL = ["seeds=[0]", "threads=1", "model.args.channels=4", "batch_size=256", "epochs=1"]


@pytest.fixture
def run(tmp_path):
    def start(*overrides, **options):
        recipe = load_recipe(DIGITS, [*SMALL, f"output={tmp_path / 'runs'}", *overrides])
        folder, results, _ = run_recipe(recipe, "digits", progress=False, **options)
        return folder, results

    return start


def lines_of(place):
    return [json.loads(line) for line in (place / "telemetry.jsonl").read_text().splitlines()]


def test_every_level_is_recorded_by_the_names_of_the_network(run):
    folder, results = run("telemetry.every_n_steps=2", compare=True)
    baseline, fixed = (lines_of(folder / f"{level}-seed0") for level in ("O0", "O1"))
    assert (baseline[0]["level"], fixed[0]["level"], fixed[0]["steps_per_epoch"]) == ("O0", "O1", 6)
    assert {line["kind"] for line in baseline} == {"run", "time", "steps"}
    assert {line["module"] for line in fixed if line["kind"] == "operand"} == {"conv1", "conv2", "fc1", "fc2"}
    assert [line["step"] for line in fixed if line["kind"] == "time"] == [0, 2, 4]

    silent, same = run("telemetry.every_n_steps=0")
    assert not (silent / "O1-seed0" / "telemetry.jsonl").exists()
    assert (same[0].test_accuracy, same[0].test_loss) == (results[1].test_accuracy, results[1].test_loss)


def test_rules_of_a_recipe(run, tmp_path):
    folder, _ = run("telemetry.rules=[{modules: fc2, operands: weight, statistics: [snr], every_n_steps: 3}]")
    samples = [line for line in lines_of(folder / "O1-seed0") if line["kind"] == "sample"]
    assert [(line["step"], line["id"]) for line in samples] == [(0, 10), (3, 10)]
    for rule, message in (
        ("{modul: fc2}", "unknown name in a telemetry rule: 'modul': did you mean 'modules'"),
        ("{modules: fc3}", "no module is called 'fc3': did you mean 'fc"),
        ("{statistics: [snt]}", "unknown statistic in a telemetry rule: 'snt': did you mean 'snr'"),
    ):
        before = set((tmp_path / "runs" / "digits").iterdir())
        with pytest.raises(ValueError, match=message):
            run(f"telemetry.rules=[{rule}]")
        assert set((tmp_path / "runs" / "digits").iterdir()) == before
    with pytest.raises(ValueError, match="unknown recipe key under telemetry: 'every'"):
        run("telemetry.every=3")
