import csv
import json
import os
import statistics
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import cnmix
from cnmix import checkpoint
from cnmix.evaluation import evaluate, evaluate_checkpoints, operand_rows
from cnmix.nn import quantized_modules
from cnmix.recipe import build_model, load_data, load_recipe
from cnmix.training import run_recipe

DIGITS = Path(__file__).resolve().parents[1] / "recipes" / "digits.yaml"
SMALL = ["seeds=[0]", "threads=1", "model.args.channels=4", "batch_size=256"]

# Classifies every position of an input; `places` are their dimensions.
SEVERAL = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Net(nn.Linear):
    def __init__(self):
        super().__init__(5, 3)

def load(places):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, *places, 5, generator=generator)
    classes = inputs[..., :3].argmax(-1)
    return TensorDataset(inputs, classes), TensorDataset(inputs[:30], classes[:30])
"""


@pytest.fixture
def run(tmp_path):
    def start(*overrides, **options):
        recipe = load_recipe(DIGITS, [*SMALL, f"output={tmp_path}", *overrides])
        return run_recipe(recipe, "digits", progress=False, **options)

    return start


@pytest.fixture
def write(tmp_path):
    def make(module, *overrides):
        (tmp_path / "own.py").write_text(module)
        file = tmp_path / "own.yaml"
        file.write_text(
            "{module: own.py, model: {name: Net}, data: {name: load}, batch_size: 8, epochs: 4, threads: 1, "
            "optimizer: {name: SGD, args: {lr: 0.5}}}"
        )
        return load_recipe(file, [f"output={tmp_path}", *overrides])

    return make


def test_folder(run, tmp_path):
    folder, results, model = run("epochs=2")
    assert folder.parent == tmp_path / "digits"
    place = folder / "O1-seed0"
    assert {path.name for path in folder.iterdir()} == {"recipe.yaml", "results.json", "O1-seed0"}
    assert {"metrics.csv", "last.ckpt", "model.pt"} <= {path.name for path in place.iterdir()}

    (result,) = results
    assert json.loads((folder / "results.json").read_text()) == [vars(result)]
    assert (result.level, result.seed, result.folder) == ("O1", 0, str(place))
    assert 0 < result.test_accuracy <= 1
    assert result.seconds > 0
    with open(place / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    tests = [row for row in rows if row.get("test_accuracy")]
    assert len(tests) == 2
    assert float(tests[-1]["test_accuracy"]) == pytest.approx(result.test_accuracy)
    assert float(tests[-1]["test_loss"]) == pytest.approx(result.test_loss, rel=1e-4)
    assert sum(bool(row.get("train_loss")) for row in rows) == 2

    again = load_recipe(folder / "recipe.yaml")
    assert (again.epochs, again.seeds, again.model.args.channels) == (2, [0], 4)
    saved = checkpoint.load(place / "model.pt")
    plain = build_model(again)
    plain.load_state_dict(saved["state_dict"], strict=True)
    assert set(saved["cnmix"]["models"][0]["modules"]) == {"conv1", "conv2", "fc1", "fc2"}
    assert evaluate(model, load_data(again)[1])[0] == result.test_accuracy
    assert torch.load(place / "last.ckpt", weights_only=True)["epoch"] == 1
    steps = {module.quantizers.config.steps_per_epoch for _, module in quantized_modules(model)}
    assert steps == {6}
    rows = list(operand_rows(model))
    assert [row[:2] for row in rows[:3]] == [("conv1", "input"), ("conv1", "weight"), ("conv1", "grad_output")]
    assert len(rows) == 12


def test_compare(run):
    folder, results, model = run("epochs=1", "seeds=[0,1]", compare=True)
    assert [(result.level, result.seed) for result in results] == [("O0", 0), ("O1", 0), ("O0", 1), ("O1", 1)]
    assert {path.parent.name for path in folder.glob("*/model.pt")} == {
        f"{each.level}-seed{each.seed}" for each in results
    }
    assert len(list(quantized_modules(model))) == 4
    evaluations = list(evaluate_checkpoints(folder))
    assert [(each.level, each.seed, each.integer_accuracy is None) for each in evaluations] == [
        ("O0", 0, True),
        ("O0", 1, True),
        ("O1", 0, False),
        ("O1", 1, False),
    ]
    floats = {(result.level, result.seed): result.test_accuracy for result in results}
    for each in evaluations[:2]:
        assert each.float_accuracy == pytest.approx(floats[each.level, each.seed])


def test_levels(run):
    folder, results, model = run("epochs=1", "seeds=[0,1]", levels=["O3", "O0", "O2"])
    order = ["O3", "O0", "O2"]
    assert [(each.level, each.seed) for each in results] == [(level, seed) for seed in (0, 1) for level in order]
    assert {module.quantizers.config.max_bitwidth for _, module in quantized_modules(model)} == {16}
    saved = checkpoint.load(folder / "O3-seed0" / "model.pt")["cnmix"]["models"][0]["modules"]
    assert {module["settings"]["weight"]["max_bitwidth"] for module in saved.values()} == {8}
    evaluations = {(each.level, each.seed): each for each in evaluate_checkpoints(folder)}
    assert set(evaluations) == {(level, seed) for seed in (0, 1) for level in order}
    assert [level for level in order if evaluations[level, 0].integer_accuracy is None] == ["O0"]


def test_a_level_in_the_list_is_the_recipes_own(run):
    _, (listed,), _ = run("epochs=1", levels=["O2"])
    _, (own,), _ = run("epochs=1", "cnmix.opt_level=O2")
    assert (listed.level, listed.test_loss) == (own.level, own.test_loss)


@pytest.mark.parametrize("places", [[], [4], [2, 3]])
def test_classes_at_several_positions(write, places):
    recipe = write(SEVERAL, f"data.args.places={places}")
    folder, (result,), model = run_recipe(recipe, "own", progress=False)
    inputs, classes = load_data(recipe)[1].tensors
    assert inputs.ndim == 2 + len(places)
    with torch.no_grad():
        scores = model(inputs)
    assert result.test_accuracy == pytest.approx((scores.argmax(-1) == classes).double().mean().item())
    expected = F.cross_entropy(scores.reshape(-1, 3), classes.reshape(-1)).item()
    assert result.test_loss == pytest.approx(expected, rel=1e-5)
    with open(folder / "O1-seed0" / "metrics.csv", newline="") as file:
        last = [row for row in csv.DictReader(file) if row.get("test_loss")][-1]
    assert float(last["test_loss"]) == pytest.approx(expected, rel=1e-4)
    assert float(last["test_accuracy"]) == pytest.approx(result.test_accuracy)
    assert expected < 0.8 < result.test_accuracy  # log(3) is 1.1


def test_classes_that_do_not_fit_the_output():
    data = TensorDataset(torch.zeros(30, 4, 5), torch.zeros(30, 3).long())
    with pytest.raises(ValueError, match=r"output has shape \(30, 4, 3\) and the classes \(30, 3\)"):
        evaluate(nn.Linear(5, 3), data)


def test_rules(run):
    rules = "cnmix.rules=[{modules: conv1, leave_out: true}, {types: Linear, operands: grad_output, width: 16}]"
    folder, results, model = run("epochs=1", rules, compare=True)
    assert len(results) == 2
    assert [fqn for fqn, _ in quantized_modules(model)] == ["conv2", "fc1", "fc2"]
    widths = {operand: quantizer.state.bits for operand, quantizer in model.fc2.quantizers}
    assert widths["grad_output"] == 16
    assert "modules: conv1" in (folder / "recipe.yaml").read_text()
    of_run = list(evaluate_checkpoints(folder / "O1-seed0"))
    assert of_run[0].integer_accuracy is not None


def test_compare_with_excluded_module(run):
    _, results, model = run("epochs=1", "cnmix.exclude=[conv1]", compare=True)
    assert len(results) == 2
    assert [fqn for fqn, _ in quantized_modules(model)] == ["conv2", "fc1", "fc2"]


def test_evaluation_of_folder_model_and_last(run):
    folder, results, _ = run("epochs=2")
    place = folder / "O1-seed0"
    of_folder, of_run, of_model, of_last = (
        list(evaluate_checkpoints(path)) for path in (folder, place, place / "model.pt", place / "last.ckpt")
    )
    assert of_folder == of_run == of_model
    assert len(of_model) == len(of_last) == 1
    assert (of_last[0].level, of_last[0].seed) == ("O1", 0)
    assert of_last[0].float_accuracy == of_model[0].float_accuracy
    assert of_last[0].integer_accuracy == of_model[0].integer_accuracy
    assert of_model[0].integer_accuracy == pytest.approx(results[0].test_accuracy, abs=0.01)


@pytest.mark.parametrize("level", ["O0", "O1"])
def test_last_of_another_seed_and_level(run, level):
    folder, _, _ = run("epochs=1", "seeds=[3,5]", "cnmix.opt_level=O1", compare=True)
    place = folder / f"{level}-seed5"
    last, model = (next(evaluate_checkpoints(place / name)) for name in ("last.ckpt", "model.pt"))
    assert (model.level, model.seed) == (level, 5)
    assert (last.level, last.seed) == (level, 5)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # test_cli.py asks for no warning
@pytest.mark.parametrize("level", ["O0", "O1"])
def test_resumed_run_is_bit_exact(run, level):
    schedule = ["scheduler.args.T_max=4"]
    whole, _, _ = run("epochs=4", *schedule, f"cnmix.opt_level={level}")
    half, _, _ = run("epochs=2", *schedule, f"cnmix.opt_level={level}")
    resumed, _, _ = run("epochs=4", *schedule, f"cnmix.opt_level={level}", resume=half / f"{level}-seed0" / "last.ckpt")
    a, b = (checkpoint.load(folder / f"{level}-seed0" / "model.pt") for folder in (whole, resumed))
    assert list(a["state_dict"]) == list(b["state_dict"])
    assert all(torch.equal(a["state_dict"][key], b["state_dict"][key]) for key in a["state_dict"])
    assert a["cnmix"] == b["cnmix"]
    assert a["result"]["test_accuracy"] == b["result"]["test_accuracy"]


def test_last_checkpoint_is_renamed_into_place(run, monkeypatch):
    # Lightning would move it from the folder for temporary files, which may be on another file system.
    renamed, rename = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (renamed.append(target.name), rename(source, target)))
    run("epochs=2")
    assert renamed == ["last.ckpt", "last.ckpt", "model.pt"]


def test_same_seed_same_run(run):
    weights = [checkpoint.load(run("epochs=1")[0] / "O1-seed0" / "model.pt")["state_dict"] for _ in range(2)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_int31_agrees_with_float32():
    recipe = load_recipe(DIGITS, ["model.args.dropout=0"])
    train, _ = load_data(recipe)
    x, y = train[:64]
    losses, gradients = {}, {}
    for kind in ("float32", "int31"):
        torch.manual_seed(0)
        model = build_model(recipe)
        if kind == "int31":
            cnmix.initialize(model, bitwidth=31)
        losses[kind] = F.cross_entropy(model(x), y)
        losses[kind].backward()
        gradients[kind] = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert losses["int31"].item() == pytest.approx(losses["float32"].item(), rel=1e-5)
    for name, expected in gradients["float32"].items():
        # Batch normalisation takes the mean away again, so the true gradient of a bias before it is zero and what
        # either kind computes is its rounding: that is measured against the gradient of the same layer's weight.
        cancelled = name in ("conv1.bias", "conv2.bias")
        scale = gradients["float32"][name.replace("bias", "weight") if cancelled else name].norm()
        assert (gradients["int31"][name] - expected).norm() <= 1e-5 * scale, name


def test_accuracy_of_digits(tmp_path):
    recipe = load_recipe(DIGITS, [f"output={tmp_path}", "epochs=6"])
    _, results, _ = run_recipe(recipe, "digits", compare=True, progress=False)
    mean = {
        level: statistics.mean(result.test_accuracy for result in results if result.level == level)
        for level in ("O0", "O1")
    }
    assert len(results) == 6
    assert mean["O1"] >= 0.975
    assert mean["O1"] >= mean["O0"] - 0.005
