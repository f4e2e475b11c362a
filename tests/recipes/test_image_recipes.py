from pathlib import Path

import pytest
import torch

from cnmix.evaluation import evaluate_checkpoints
from cnmix.recipe import build_model, load_data, load_recipe
from cnmix.task import batches, call, load_task
from cnmix.training import run_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FEW = ["data.args.train_images=8", "data.args.test_images=4", "test_batch_size=2"]


@pytest.mark.parametrize(("name", "few"), [("resnet50", FEW), ("vgg19", FEW), ("crnn", FEW), ("mnist", [])])
def test_tiny(name, few):
    recipe = load_recipe(RECIPES / f"{name}.yaml", few, tiny=True)
    torch.manual_seed(0)
    model, task = build_model(recipe), load_task(recipe)
    train, test = load_data(recipe)
    inputs, targets = next(iter(batches(train, recipe.batch_size)))
    loss = task.loss(call(model, inputs), targets)
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in model.parameters())
    inputs, targets = next(iter(batches(test, 2)))
    right, of = task.score(call(model.eval(), inputs), targets)
    assert (0 <= right <= of, of) == (True, 2)


@pytest.mark.parametrize("name", ["resnet50", "vgg19", "crnn"])
def test_the_whole_recipe(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    with torch.device("meta"):
        build_model(recipe)
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/data/\w+/train.* nothing is downloaded"):
        load_data(recipe)


def test_crnn_from_training_to_integers(tmp_path):
    recipe = load_recipe(
        RECIPES / "crnn.yaml",
        [*FEW, "epochs=1", "batch_size=4", "threads=1", "model.args.width=2", f"output={tmp_path}"],
        tiny=True,
    )
    folder, results, _ = run_recipe(recipe, "crnn", progress=False)
    assert results[0].test_accuracy in (0, 0.25, 0.5, 0.75, 1)
    (found,) = evaluate_checkpoints(folder)
    assert found.integer_accuracy is not None
