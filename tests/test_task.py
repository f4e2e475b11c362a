import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from cnmix import checkpoint
from cnmix.evaluation import evaluate, evaluate_checkpoints
from cnmix.recipe import load_data, load_recipe
from cnmix.task import CLASSIFICATION, Task, batches, call, load_task
from cnmix.training import run_recipe

# Two inputs, of which one has a length of its own; a target of two parts; and a loss and a score of its own.
OWN = """
import torch
from torch import nn
from beside import Pairs

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, first, second):
        joined = self.first(first) + self.second(second).sum(1)
        return joined[:, :2], joined[:, 2:]

def load():
    return Pairs(40), Pairs(15)

def loss(outputs, targets, power=2):
    return sum((output - target).abs().pow(power).mean() for output, target in zip(outputs, targets))

def score(outputs, targets, tolerance=0.5):
    far = torch.stack([(output - target).abs().amax(1) for output, target in zip(outputs, targets)])
    return int((far.amax(0) < tolerance).sum()), far.shape[1]

def wrong(outputs, targets, power=2):
    return outputs
"""
BESIDE = """
import torch
from torch.nn.utils.rnn import pad_sequence

class Pairs:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        drawn = torch.randn(9, generator=torch.Generator().manual_seed(index))
        return (drawn[:3], drawn[3:7].reshape(2, 2)[: 1 + index % 2]), (drawn[:2], drawn[1:3])

    def collate(self, samples):
        inputs, targets = zip(*samples)
        first, second = zip(*inputs)
        return (torch.stack(first), pad_sequence(second, batch_first=True)), tuple(map(torch.stack, zip(*targets)))
"""
RECIPE = {
    "module": "own.py",
    "model": {"name": "Net"},
    "data": {"name": "load"},
    "loss": {"name": "loss", "args": {"power": 2}},
    "score": {"name": "score"},
    "batch_size": 8,
    "test_batch_size": 4,
    "epochs": 6,
    "threads": 1,
    "optimizer": {"name": "SGD", "args": {"lr": 0.2}},
}


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "beside.py").write_text(BESIDE)
    (tmp_path / "own.yaml").write_text(json.dumps(RECIPE))
    return lambda *overrides: load_recipe(tmp_path / "own.yaml", [f"output={tmp_path}", *overrides])


def test_a_task_of_its_own(recipe):
    folder, results, model = run_recipe(recipe(), "own", compare=True, progress=False)
    task = load_task(recipe())
    inputs, targets = next(iter(batches(load_data(recipe())[1], 15)))
    assert inputs[1].shape == (15, 2, 2)
    with torch.no_grad():
        outputs = call(model, inputs)
    right, count = task.score(outputs, targets)
    assert count == 15
    assert results[1].test_accuracy == right / 15 > 0.8
    assert results[1].test_loss == pytest.approx(task.loss(outputs, targets).item(), rel=1e-4)
    for each, result in zip(evaluate_checkpoints(folder), results, strict=True):
        assert (each.float_accuracy, each.float_loss) == pytest.approx(
            (result.test_accuracy, result.test_loss), abs=0.1
        )
    assert each.integer_accuracy == pytest.approx(result.test_accuracy, abs=0.1)
    assert set(checkpoint.load(folder / "O1-seed0" / "model.pt")["cnmix"]["models"][0]["modules"]) == {
        "first",
        "second",
    }


def test_processes_that_load_change_nothing(recipe):
    losses = [
        run_recipe(recipe(f"workers={workers}", "epochs=1"), "own", progress=False)[1][0].test_loss
        for workers in (0, 1)
    ]
    assert losses[0] == losses[1]


def test_arguments_of_loss_and_score(recipe):
    outputs, targets = (torch.full((2, 2), 3.0), torch.zeros(2, 2)), (torch.zeros(2, 2), torch.zeros(2, 2))
    assert load_task(recipe()).loss(outputs, targets) == 9
    assert load_task(recipe("loss.args.power=1")).loss(outputs, targets) == 3
    assert load_task(recipe()).score(outputs, targets) == (0, 2)
    assert load_task(recipe("score.args.tolerance=3.5")).score(outputs, targets) == (2, 2)


def test_what_a_recipe_that_names_neither_is_for(recipe):
    assert load_task(recipe("loss.name=null", "score.name=null")) == CLASSIFICATION == Task()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.name=los"], "unknown name in own.py 'los': did you mean 'loss'"),
        (["loss.args.powr=1"], "unknown argument of loss in loss.args: 'powr': did you mean 'power'"),
        (["loss.args.outputs=1"], "unknown argument of loss in loss.args: 'outputs'"),
    ],
)
def test_bad_names(recipe, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_task(recipe(*overrides))
    with pytest.raises(ValueError, match=message):  # before a folder is made
        run_recipe(recipe(*overrides), "own", progress=False)


def test_what_a_function_returns(recipe):
    task = load_task(recipe("loss.name=wrong", "score.name=wrong"))
    with pytest.raises(ValueError, match=r"loss wrong must return a tensor without dimensions, got .*shape \(2,\)"):
        task.loss(torch.zeros(2), None)
    with pytest.raises(ValueError, match="loss wrong must return a tensor without dimensions, got 3"):
        task.loss(3, None)
    with pytest.raises(ValueError, match=r"score wrong must return two integers, .*, got \(1, 2.5\)"):
        task.score((1, 2.5), None)


def test_batches_weigh_what_the_score_counts():
    data = TensorDataset(torch.eye(5), torch.tensor([0, 1, 0, -1, -1]))

    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets, ignore_index=-1)

    def score(outputs, targets):
        return int((outputs.argmax(1) == targets).sum()), int((targets >= 0).sum())

    torch.manual_seed(0)
    model, task = nn.Linear(5, 2), Task(loss, score)
    expected = evaluate(model, batches(data, 5), task)
    for batch_size in (1, 2, 3):
        assert evaluate(model, batches(data, batch_size), task) == pytest.approx(expected)
    with pytest.raises(ValueError, match="nothing that the score counts"):
        evaluate(model, TensorDataset(torch.eye(5), torch.full((5,), -1)), task)


def test_files_beside_a_recipe_are_its_own(recipe, tmp_path):
    assert len(load_data(recipe())[0]) == 40
    other = tmp_path / "other"
    other.mkdir()
    (other / "beside.py").write_text(BESIDE.replace("self.count = count", "self.count = count + 1"))
    (other / "own.py").write_text(OWN)
    assert len(load_data(load_recipe(tmp_path / "own.yaml", [f"module={other / 'own.py'}"]))[0]) == 41
    assert len(load_data(recipe("data.name=Pairs", "data.args.count=3"))) == 3


def test_what_fails_in_another_process_is_one_line(recipe, command, tmp_path):
    recipe()
    failing = "    def __getitem__(self, index):\n        raise ValueError('x.jpg is damaged')\n"
    (tmp_path / "beside.py").write_text(BESIDE.replace("    def __getitem__", f"{failing}\n    def unused"))
    code, _, error = command("train", "own.yaml", "workers=1")
    assert (code, error) == (2, "error: ValueError: x.jpg is damaged\n")
