"""Timed runs of recipes, with a clock that is set by hand where times are looked at."""

import json
import os

import pytest
import torch
from benchmark_logs import records

from cnmix.benchmark import Plan, collector, estimates, make_plan, runs
from cnmix.benchmark.runs import run_benchmark
from cnmix.nn import quantizer_sets
from cnmix.recipe import load_recipe
from cnmix.torch_mlu.catch_perf.profiler import Operator
from cnmix.torch_mlu.cost_model import LAUNCH, Estimate, Product


@pytest.fixture
def no_estimates(monkeypatch):
    monkeypatch.setattr(runs, "estimate_steps", lambda *_: ({}, "left out"))


def test_the_plan_of_the_variables(monkeypatch):
    assert make_plan() == Plan(100, 50)
    monkeypatch.setenv("MLU_ADAPTIVE_STRATEGY_COUNT", "7")
    assert make_plan(9) == Plan(7, 9)
    monkeypatch.setenv("CATCH_MODEL_TOTAL_ITERS", "10")
    assert make_plan() == Plan(7, 3)
    monkeypatch.delenv("MLU_ADAPTIVE_STRATEGY_COUNT")
    assert make_plan() == Plan(1, 9)
    assert make_plan().total == 10
    monkeypatch.setenv("MLU_ADAPTIVE_STRATEGY_COUNT", "0")
    assert make_plan() == Plan(0, 10)


@pytest.mark.parametrize(
    ("count", "total", "iterations", "message"),
    [
        ("ten", None, 50, "MLU_ADAPTIVE_STRATEGY_COUNT must be a whole number of iterations, 0 or more, got 'ten'"),
        (None, "-3", 50, "CATCH_MODEL_TOTAL_ITERS must be a whole number"),
        (None, "1", 50, "^CATCH_MODEL_TOTAL_ITERS=1 leaves nothing to time: it needs at least 2"),
        ("0", "0", 50, "^CATCH_MODEL_TOTAL_ITERS=0 leaves nothing to time"),
        (
            "60",
            "60",
            50,
            "MLU_ADAPTIVE_STRATEGY_COUNT skips 60 iterations, and CATCH_MODEL_TOTAL_ITERS ends the run",
        ),
        (None, None, 0, "needs at least 1 iteration, got 0"),
    ],
)
def test_a_plan_without_an_iteration_to_time_is_refused(count, total, iterations, message, monkeypatch):
    for name, value in {"MLU_ADAPTIVE_STRATEGY_COUNT": count, "CATCH_MODEL_TOTAL_ITERS": total}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        make_plan(iterations)


@pytest.fixture
def steps(monkeypatch):
    """Has the n-th step of a level take 1000 s up to ``skipped``, then alternately 0.25 and 0.75 s; tells of each."""
    clock, seen = [0.0], []
    train_step = runs.train_step

    def timed(network, optimizer, loss, inputs, targets, level):
        train_step(network, optimizer, loss, inputs, targets, level)
        done = sum(each["level"] == level for each in seen)
        clock[0] += 1000.0 if done < steps.skipped else (0.25, 0.75)[(done - steps.skipped) % 2]
        updates = {q.state.updates for _, quantizers in quantizer_sets(network) for _, q in quantizers}
        seen.append({"level": level, "updates": updates, "size": len(inputs), "sum": float(inputs.sum())})

    class Steps:
        skipped = 100

    steps = Steps()
    steps.seen = seen
    monkeypatch.setattr(runs, "train_step", timed)
    monkeypatch.setattr(collector, "perf_counter", lambda: clock[0])
    return steps


def test_exactly_the_first_100_iterations_are_left_out(recipe, steps, no_estimates, tmp_path, monkeypatch):
    monkeypatch.setenv("MLU_ADAPTIVE_STRATEGY_COUNT", "100")
    monkeypatch.setenv("BENCHMARK_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("AVG_LOG", str(tmp_path / "avg"))
    monkeypatch.setenv("DATASET_NAME", "noise")
    levels = ["fp32", "O0", "O1", "O2", "O3"]
    result = run_benchmark(load_recipe(recipe), "small", make_plan(), levels)
    assert [(each.level, each.average, each.variance, each.throughput) for each in result.levels] == [
        (level, 0.5, 0.0625, 16.0) for level in levels
    ]
    assert len(steps.seen) == 5 * 150
    for level in ("O1", "O2", "O3"):
        updates = [each["updates"] for each in steps.seen if each["level"] == level]
        assert len(updates[99]) >= 1
        assert all(each == updates[99] for each in updates[99:])  # and nothing was measured after them
    assert steps.seen[300]["level"] == "O1"
    assert {each["size"] for each in steps.seen} == {8}
    sums = [[each["sum"] for each in steps.seen if each["level"] == level] for level in levels]
    assert all(each == sums[0] for each in sums)  # the same data in the same order
    logged = records(tmp_path / "log")
    assert [each["precision"] for each in logged] == levels
    del logged[0]["date"]
    assert logged[0] == {
        "net": "small",
        "batch_size": 8,
        "cards": 1,
        "precision": "fp32",
        "DPF_mode": "single",
        "batch_time_avg": 0.5,
        "batch_time_var": 0.0625,
        "hardware_time_avg": "unknow",
        "hardware_time_var": "unknow",
        "throughput": 16.0,
        "device": logged[1]["device"],
        "dataset": "noise",
    }
    assert (tmp_path / "avg").read_text() == 5 * "net:small, accuracy:not valid (MLU_ADAPTIVE_STRATEGY_COUNT=100)\n"


def test_the_variable_is_put_back(recipe, no_estimates, caplog):
    run_benchmark(load_recipe(recipe), "small", Plan(2, 1), ["O1"])
    assert "MLU_ADAPTIVE_STRATEGY_COUNT" not in os.environ
    assert "MLU_ADAPTIVE_STRATEGY_COUNT" not in caplog.text


@pytest.mark.parametrize(
    ("levels", "devices", "message"),
    [
        (["fp32", "fp32"], 1, "name each level once"),
        ([], 1, "name each level once, .* got none"),
        (["O9"], 1, "O9"),
        (["O1"], 0, "1 to 64 devices, got 0"),
        (["O1"], 21, "21 devices need a sample each, and the training data has 20"),
    ],
)
def test_what_cannot_run_is_refused(levels, devices, message, recipe):
    with pytest.raises(ValueError, match=message):
        run_benchmark(load_recipe(recipe), "small", Plan(1, 1), levels, devices=devices)


def test_the_command_with_two_devices_and_estimates(recipe, command, tmp_path, monkeypatch):
    monkeypatch.setenv("MLU_ADAPTIVE_STRATEGY_COUNT", "3")
    monkeypatch.setenv("BENCHMARK_LOG", str(tmp_path / "log"))
    arguments = ("--levels", "fp32,O1", "--devices", 2, "--tiny", "--iterations", 4)
    code, output, errors = command("benchmark", recipe, *arguments)
    assert code == 0, errors
    assert "3 iterations in which operands adapt, then 4 that are timed" in output
    assert "small: 4 iterations of 4 samples on 2 devices" in output
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in output.splitlines() if line.startswith("│")}
    cards = [f"MLU{number}, s, ESTIMATED" for number in (220, 270, 290, 370, 590)]
    assert [*rows] == ["batch_time_avg, s", "batch_time_var, s²", "throughput, samples/s", "× fp32", *cards]
    assert all(float(cell) > 0 for row in cards for cell in rows[row])
    assert "nothing was measured on a card" in " ".join(output.split())
    assert [(each["precision"], each["cards"], each["DPF_mode"]) for each in records(tmp_path / "log")] == [
        ("fp32", 2, "ddp "),
        ("O1", 2, "ddp "),
    ]


def test_a_mistake_is_one_line(recipe, command, monkeypatch):
    monkeypatch.setenv("MLU_ADAPTIVE_STRATEGY_COUNT", "1e3")
    code, _, errors = command("benchmark", recipe)
    assert code == 2
    assert errors.startswith("error: MLU_ADAPTIVE_STRATEGY_COUNT must be a whole number of iterations")


def test_a_log_that_cannot_be_written_is_refused_before_the_run(recipe, steps, tmp_path, monkeypatch):
    monkeypatch.setenv("AVG_LOG", str(tmp_path / "missing/log"))
    with pytest.raises(ValueError, match=r"AVG_LOG=.* cannot be written: there is no folder"):
        run_benchmark(load_recipe(recipe), "small", Plan(1, 1), ["fp32"])
    assert not steps.seen


def test_a_count_of_0_closes_nothing(recipe, command, steps, no_estimates, monkeypatch):
    monkeypatch.setenv("MLU_ADAPTIVE_STRATEGY_COUNT", "0")
    steps.skipped = 0
    code, output, _ = command("benchmark", recipe, "--levels", "O1", "--iterations", 4, "cnmix.online=true")
    assert code == 0
    assert output.startswith("4 iterations that are timed, in which operands adapt as ever; no evaluation")
    assert [each["updates"] for each in steps.seen] == [{1}, {2}, {3}, {4}]
    assert "0.5" in output


def test_the_table_without_estimates(recipe, command, no_estimates):
    code, output, _ = command("benchmark", recipe, "--levels", "O1", "--iterations", 1)
    assert code == 0
    assert "ESTIMATED" not in output
    assert "no estimates for the cards: left out" in output
    assert "× fp32" in output


def test_an_estimate_for_another_card():
    traffic, macs = 614_400, 10**9
    estimate = Estimate(1.0, 1.0, LAUNCH, traffic, (Product(macs, "float32", "float32"),))
    narrow = Estimate(1.0, 1.0, LAUNCH, traffic, (Product(macs, "int8", "int16"),))
    half = Estimate(1.0, 1.0, LAUNCH, traffic, (Product(macs, "bfloat16", "bfloat16"),))
    operators = [Operator("aten::mm", 1.0, each, ()) for each in (estimate, narrow, half, None)]
    clock = 128e12 / 2**17
    floating = macs / (32 * clock) * (1 / 384 + 1 / 2048 + 1 / 1536)
    assert estimates._seconds_on("MLU370", operators) == pytest.approx(floating + 3 * LAUNCH)
    fixed = macs / (16 * clock) * (1 / 512 + 1 / 2048 + 1 / 2048)  # int31, and int16 for half precision
    assert estimates._seconds_on("MLU270", operators) == pytest.approx(fixed + 3 * LAUNCH)


def test_why_there_are_no_estimates(recipe, tmp_path, monkeypatch):
    def install(*_, **__):
        raise RuntimeError("the card needs a C++ compiler\nand more")

    monkeypatch.setattr("cnmix.torch_mlu.install", install)
    estimates._run({}, ("O1",), str(tmp_path))
    found = json.loads((tmp_path / "estimates.json").read_text())
    assert found == {"estimates": {}, "reason": "RuntimeError: the card needs a C++ compiler"}


def test_each_process_has_its_own_samples():
    orders = [iter(runs._Endless(5, 3, rank, 2)) for rank in range(2)]
    first, second = [next(orders[0]) for _ in range(3)], [next(orders[1]) for _ in range(2)]
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    again = [next(orders[0]) for _ in range(3)] + [next(orders[1]) for _ in range(2)]
    assert sorted(again) == [0, 1, 2, 3, 4]
    assert again != first + second


def test_training_closes_and_evaluates_nothing(recipe, command, monkeypatch, caplog):
    monkeypatch.setenv("MLU_ADAPTIVE_STRATEGY_COUNT", "4")
    evaluated = []
    monkeypatch.setattr("cnmix.training.Training.validation_step", lambda *_: evaluated.append(1))
    code, output, errors = command("train", recipe)
    assert code == 0, errors
    said = "MLU_ADAPTIVE_STRATEGY_COUNT=4: the adaptive strategy closes after 4 iterations; there is no evaluation, and"
    assert output.splitlines()[0].startswith(said)
    assert "test accuracy not valid" in output
    assert "cnmix eval" not in output
    assert not evaluated
    assert "MLU_ADAPTIVE_STRATEGY_COUNT" not in caplog.text  # it is said once
    (folder,) = (recipe.parent / "runs/small").iterdir()
    (result,) = json.loads((folder / "results.json").read_text())
    assert (result["test_accuracy"], result["test_loss"], result["strategy_count"]) == (None, None, 4)
    saved = torch.load(folder / "O1-seed0/model.pt", weights_only=True)
    modules = saved["cnmix"]["models"][0]["modules"].values()
    assert {operand["updates"] for module in modules for operand in module["operands"].values()} == {4}
    assert "test_accuracy" not in (folder / "O1-seed0/metrics.csv").read_text()


def test_a_count_beyond_the_run_is_reported(recipe, command, monkeypatch):
    monkeypatch.setenv("MLU_ADAPTIVE_STRATEGY_COUNT", "100")
    code, output, _ = command("train", recipe)
    assert code == 0
    beyond = "MLU_ADAPTIVE_STRATEGY_COUNT=100 is beyond the 6 iterations of a run: the adaptive strategy does not close"
    assert output.startswith(beyond)


def test_a_resumed_run_counts_what_is_left(recipe, command, monkeypatch):
    assert command("train", recipe)[0] == 0
    monkeypatch.setenv("MLU_ADAPTIVE_STRATEGY_COUNT", "3")
    (last,) = recipe.parent.glob("runs/small/*/O1-seed0/last.ckpt")
    code, output, errors = command("train", recipe, "epochs=3", "--resume", last)
    assert code == 0, errors
    assert output.startswith("MLU_ADAPTIVE_STRATEGY_COUNT=3 is beyond the 3 iterations of a run")


def test_training_refuses_a_bad_value_before_a_folder_is_made(recipe, command, monkeypatch):
    monkeypatch.setenv("MLU_ADAPTIVE_STRATEGY_COUNT", "-1")
    code, _, errors = command("train", recipe)
    assert code == 2
    assert "MLU_ADAPTIVE_STRATEGY_COUNT must be a whole number" in errors
    assert not (recipe.parent / "runs").exists()
