import json
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from cnmix.config import QuantizeConfig
from cnmix.recipe import (
    build_model,
    build_optimizer,
    choose_levels,
    fixed_point_settings,
    load_data,
    load_recipe,
    recipe_rules,
)
from cnmix.rules import Rule
from cnmix.shipped import shipped_recipes
from cnmix.strategies import LEVELS

DIGITS = Path(__file__).resolve().parents[1] / "recipes" / "digits.yaml"

MODULE = """
from torch import nn, zeros
from torch.utils.data import TensorDataset

class Net(nn.Linear):
    def __init__(self, width: int = 2):
        super().__init__(3, width)

def load(count: int = 4):
    data = TensorDataset(zeros(count, 3), zeros(count).long())
    return data, data
"""

MINIMAL = {
    "module": "own.py",
    "model": {"name": "Net"},
    "data": {"name": "load"},
    "epochs": 1,
    "optimizer": {"name": "SGD", "args": {"lr": 0.1}},
}


@pytest.fixture
def write(tmp_path):
    def make(recipe, module=MODULE):
        (tmp_path / "own.py").write_text(module)
        path = tmp_path / "own.yaml"
        path.write_text(recipe if isinstance(recipe, str) else json.dumps(recipe))
        return path

    return make


def test_shipped_recipes():
    for path in DIGITS.parent.glob("*.yaml"):
        recipe = load_recipe(path)
        assert isinstance(recipe, DictConfig)
        assert Path(recipe.module).is_file()
        small = load_recipe(path, tiny=True) if shipped_recipes()[path.stem].tiny else recipe
        assert isinstance(build_model(small), nn.Module)
        assert recipe.cnmix.opt_level == "O1"
        for level in LEVELS.values():  # a setting there would be every level's
            assert level.configure(fixed_point_settings(recipe)) == level.defaults


def test_defaults_and_overrides(write):
    recipe = load_recipe(write(MINIMAL), ["epochs=3", "optimizer.args.lr=0.5", "seeds=[4,5]", "cnmix.gamma=1"])
    assert (recipe.epochs, recipe.batch_size, recipe.optimizer.args.lr) == (3, 64, 0.5)
    assert recipe.seeds == [4, 5]
    assert recipe.scheduler.name is None
    settings = fixed_point_settings(recipe)
    assert QuantizeConfig(**settings) == QuantizeConfig(gamma=1)
    assert "steps_per_epoch" not in settings  # the trainer's to say
    assert fixed_point_settings(load_recipe(write(MINIMAL), ["cnmix.steps_per_epoch=7"]))["steps_per_epoch"] == 7
    assert OmegaConf.is_readonly(recipe)


def test_builders(write):
    recipe = load_recipe(
        write(MINIMAL),
        ["model.args.width=5", "data.args.count=7", "scheduler.name=StepLR", "scheduler.args.step_size=2"],
    )
    model = build_model(recipe)
    assert model.out_features == 5
    assert len(load_data(recipe)[0]) == 7
    optimizer, scheduler = build_optimizer(recipe, model.parameters())
    assert isinstance(optimizer, torch.optim.SGD)
    assert isinstance(scheduler, torch.optim.lr_scheduler.StepLR)


@pytest.mark.parametrize(
    ("own", "compare", "levels", "chosen"),
    [
        ("O1", False, [], ["O1"]),
        ("O2", True, [], ["O0", "O2"]),
        ("O0", True, [], ["O0"]),
        ("O1", False, ["O3"], ["O3"]),
        ("O1", False, ["O2", "O0", "O1"], ["O2", "O0", "O1"]),
    ],
)
def test_levels(own, compare, levels, chosen):
    assert choose_levels(load_recipe(DIGITS, [f"cnmix.opt_level={own}"]), compare, levels) == chosen


def test_settings_hold_at_every_level_that_quantizes():
    recipe = load_recipe(DIGITS, ["cnmix.bitwidth=16"])
    assert choose_levels(recipe, False, ["O0", "O1", "O2"]) == ["O0", "O1", "O2"]
    with pytest.raises(ValueError, match="'O3' cannot take the recipe's settings: bitwidth 16 is over max_bitwidth 8"):
        choose_levels(recipe, False, ["O0", "O1", "O3"])


@pytest.mark.parametrize(
    ("compare", "levels", "message"),
    [
        (False, ["O1", "o2"], "unknown opt_level 'o2': .*did you mean 'O2'"),
        (False, [""], "unknown opt_level ''"),
        (False, ["O1", "O2", "O1"], "--levels names a level twice: O1,O2,O1"),
        (True, ["O1"], "drop --compare"),
    ],
)
def test_bad_levels(compare, levels, message):
    with pytest.raises(ValueError, match=message):
        choose_levels(load_recipe(DIGITS), compare, levels)


def test_interpolation(write):
    recipe = load_recipe(write({**MINIMAL, "batch_size": "${epochs}"}))
    assert recipe.batch_size == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["epoch=3"], "unknown recipe key 'epoch': did you mean 'epochs'"),
        (["optimizer.arg.lr=3"], "unknown recipe key under optimizer. 'arg': did you mean 'args'"),
        (["cnmix.bitwith=8"], "did you mean 'bitwidth'"),
        (["cnmix.treshold=0.1"], "did you mean 'threshold'"),
        (["cnmix.opt_level=o1"], "did you mean 'O1'"),
        (["cnmix.bitwidth=9"], "bitwidth must be one of 8, 16, 31"),
        (["cnmix.bitwidth=31", "cnmix.max_bitwidth=16"], "over max_bitwidth"),
        (["epochs=many"], "epochs: .*many"),
        (["epochs=2.5"], "epochs"),
        (["epochs=0"], "epochs must be at least 1, got 0"),
        (["batch_size=-1"], "batch_size must be at least 1, got -1"),
        (["epochs=null"], "epochs"),
        (["seeds=[]"], "seeds must name at least one seed"),
        (["seeds=3"], "seeds"),
        (["seeds=[1,0,1]"], r"seeds names a seed twice: \[1, 0, 1\]"),
        (["model.args.channels=["], r"the override 'model.args.channels=\[' is no YAML"),
        (["seeds=[a]"], "seeds"),
        (["optimizer=SGD"], "optimizer"),
        (["model.args=[1]"], "model.args"),
        (["threads=0"], "threads must be at least 1, got 0"),
        (["epochs"], "an override has the form key=value, got 'epochs'"),
        (["batch_size=${nothing}"], "nothing"),
    ],
)
def test_bad_override(overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(DIGITS, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({key: value for key, value in MINIMAL.items() if key != "epochs"}, "lacks epochs"),
        ({key: value for key, value in MINIMAL.items() if key not in ("model", "module")}, "lacks model.name, module"),
        ("[1, 2]", "must be a mapping of recipe keys"),
        ("", "lacks"),
        ("just text", "unknown recipe key 'just text'"),
        ("epochs: [1", "own.yaml"),
        ("\t- a", "own.yaml"),
    ],
)
def test_bad_file(write, recipe, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(write(recipe))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("build", "override", "message"),
    [
        (build_model, "model.name=net", "did you mean 'Net'"),
        (build_model, "model.args.widht=3", "unknown argument of Net in model.args: 'widht': did you mean 'width'"),
        (load_data, "data.name=laod", "did you mean 'load'"),
        (load_data, "data.args.cuont=3", "did you mean 'count'"),
        (None, "optimizer.name=SDG", "unknown name in torch.optim 'SDG': did you mean 'SGD'"),
        (None, "optimizer.args.lrr=3", "did you mean 'lr'"),
        (None, "optimizer.args.lr=-1", "Invalid learning rate: -1"),
        (None, "scheduler.name=StepRL", "did you mean 'StepLR'"),
    ],
)
def test_bad_names_of_what_is_built(write, build, override, message):
    recipe = load_recipe(write(MINIMAL), [override])
    with pytest.raises(ValueError, match=message):
        build(recipe) if build else build_optimizer(recipe, [nn.Parameter(torch.zeros(1))])


def test_bytes_of_another_encoding(write):
    path = write(MINIMAL)
    path.write_bytes(b"output: \xfc")
    with pytest.raises(ValueError, match=r"own\.yaml is no YAML: 'utf-8' codec"):
        load_recipe(path)


def test_missing_files(write, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no recipe"):
        load_recipe(tmp_path / "nothing.yaml")
    with pytest.raises(FileNotFoundError, match="there is no recipe"):
        load_recipe(tmp_path)
    recipe = load_recipe(write({**MINIMAL, "module": "nothing.py"}))
    with pytest.raises(FileNotFoundError, match=r"module .*nothing.py is missing"):
        build_model(recipe)


def test_rules():
    recipe = load_recipe(DIGITS, ["cnmix.exclude=[conv1]", "cnmix.rules=[{modules: [fc1, fc2], width: 16}]"])
    assert recipe_rules(recipe) == (
        Rule(modules=("conv1",), leave_out=True),
        Rule(modules=("fc1", "fc2"), settings={"bitwidth": 16, "max_bitwidth": 16}),
    )
    assert "rules" not in fixed_point_settings(recipe)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("[{module: fc1, width: 16}]", "unknown name in a rule: 'module': did you mean 'modules'"),
        ("[fc1]", "a rule is a mapping"),
        ("{modules: fc1, width: 16}", "cnmix.rules must be a list"),
    ],
)
def test_wrong_rules(rules, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(DIGITS, [f"cnmix.rules={rules}"])


TINY = {
    **MINIMAL,
    "model": {"name": "Net", "args": {"width": 7}},
    "data": {"name": "load", "args": {"count": 9}},
    "scheduler": {"name": "CosineAnnealingLR", "args": {"T_max": "${epochs}"}},
    "epochs": 50,
    "tiny": {"epochs": 3, "model": {"args": {"width": 4}}, "optimizer": {"name": "AdamW"}},
}


def test_tiny(write):
    full, tiny = load_recipe(write(TINY)), load_recipe(write(TINY), tiny=True)
    assert (full.epochs, full.model.args.width, full.optimizer.name, full.optimizer.args.lr) == (50, 7, "SGD", 0.1)
    assert (tiny.epochs, tiny.model.args.width, tiny.scheduler.args.T_max) == (3, 4, 3)
    assert (tiny.optimizer.name, dict(tiny.optimizer.args)) == ("AdamW", {})  # a name takes its own arguments alone
    assert tiny.data == full.data
    assert full.tiny == tiny.tiny == {}
    assert load_recipe(write(TINY), ["epochs=4"], tiny=True).scheduler.args.T_max == 4


def test_tiny_that_there_is_not(write):
    with pytest.raises(ValueError, match=r"own.yaml has no tiny settings"):
        load_recipe(write(MINIMAL), tiny=True)
    with pytest.raises(ValueError, match="beside --tiny give the keys themselves"):
        load_recipe(write(TINY), ["tiny.epochs=2"])


@pytest.mark.parametrize(
    ("tiny", "message"),
    [
        ({"epoch": 1}, "own.yaml: tiny: unknown recipe key 'epoch': did you mean 'epochs'"),
        ({"epochs": 0}, "own.yaml: tiny: epochs must be at least 1, got 0"),
        ({"epochs": "x"}, "own.yaml: tiny: epochs: .*'x'"),
        ({"optimizer": {"arg": {}}}, "tiny: unknown recipe key under optimizer. 'arg'"),
        ({"cnmix": {"bitwidth": 9}}, "tiny: bitwidth must be one of 8, 16, 31"),
        ({"cnmix": {"rules": [{"module": "x"}]}}, "tiny: unknown name in a rule: 'module': did you mean 'modules'"),
        ({"tiny": {}}, "tiny: has tiny settings of its own"),
        ({"epochs": "${nothing}"}, "tiny: epochs: .*nothing"),
        (3, "tiny must be a mapping of recipe keys, got 3"),
        (None, "tiny must be a mapping of recipe keys, got None"),
    ],
)
@pytest.mark.parametrize("wanted", [False, True])
def test_tiny_is_checked_whether_it_is_wanted_or_not(write, tiny, message, wanted):
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(write({**TINY, "tiny": tiny}), tiny=wanted)
    assert "\n" not in str(caught.value)


def test_what_tiny_leaves_to_the_command_line(write):
    lacking = {key: value for key, value in TINY.items() if key != "optimizer"}
    lacking["tiny"] = {"batch_size": 2}
    assert load_recipe(write(lacking), ["optimizer.name=SGD"], tiny=True).batch_size == 2


@pytest.mark.parametrize("override", ["workers=-1", "test_batch_size=0"])
def test_loading_settings(write, override):
    with pytest.raises(ValueError, match="must be at least"):
        load_recipe(write(MINIMAL), [override])
