"""What the plugins are built from."""

import pickle

import pytest
from hosts import loader
from omegaconf import OmegaConf

from cnmix.nn import quantized_modules

RECIPE = """
module: there_is_no_such_file.py
batch_size: 4
cnmix:
  opt_level: O2
  bitwidth: 16
  gamma: ${batch_size}
  exclude: [conv]
  rules:
    - {modules: fc, threshold: 0.02}
"""


@pytest.fixture(params=["path", "mapping", "section", "omegaconf"])
def recipe(request, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    given = OmegaConf.create(RECIPE)
    plain = OmegaConf.to_container(given, resolve=True)
    kinds = {"path": str(tmp_path / "recipe.yaml"), "mapping": plain, "section": plain["cnmix"], "omegaconf": given}
    return kinds[request.param]


def shown(plugin):
    rules = [({*rule.modules}, rule.leave_out, dict(rule.settings)) for rule in plugin.rules]
    return plugin.opt_level, plugin.settings, rules


def test_recipe(host, recipe):
    plugin = host.Plugin(recipe=recipe)
    rules = [({"conv"}, True, {}), ({"fc"}, False, {"threshold": 0.02})]
    assert shown(plugin) == ("O2", {"bitwidth": 16, "gamma": 4}, rules)
    assert b"omegaconf" not in pickle.dumps(plugin)
    assert shown(host.FabricPlugin(recipe=recipe)) == shown(plugin)


def test_arguments_go_over_the_recipe(host, recipe):
    arguments = {"opt_level": "O1", "bitwidth": 8, "settings": {"gamma": 1.0}, "exclude": [], "rules": []}
    assert shown(host.Plugin(recipe=recipe, **arguments)) == ("O1", {"bitwidth": 8, "gamma": 1.0}, [])
    assert shown(host.Plugin(recipe=recipe, rules=[{"modules": "fc", "width": 31}]))[2] == [
        ({"conv"}, True, {}),
        ({"fc"}, False, {"bitwidth": 31, "max_bitwidth": 31}),
    ]
    assert shown(host.Plugin(recipe=recipe, opt_level="O0")) == ("O0", {}, [])


def test_recipe_in_training(host, tmp_path):
    task = host.Task()
    recipe = {"cnmix": {"opt_level": "O3", "exclude": ["conv"], "activation_dtype": "float32", "steps_per_epoch": 9}}
    host.trainer(tmp_path, host.Plugin(recipe=recipe)).fit(task, loader())
    assert [fqn for fqn, _ in quantized_modules(task)] == ["fc"]
    assert task.fc.quantizers.config.max_bitwidth == 8
    assert task.seen[0] == {9}


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        ("nowhere.yaml", FileNotFoundError, "there is no recipe nowhere.yaml"),
        (
            {"cnmix": {"opt_levle": "O2"}},
            ValueError,
            "recipe: unknown recipe key under cnmix: 'opt_levle'.*'opt_level'",
        ),
        ({"opt_levle": "O2"}, ValueError, "did you mean 'opt_level'"),
        ({"cnmix": {"opt_level": "O9"}}, ValueError, "unknown opt_level 'O9'"),
        ({"bitwidth": 9}, ValueError, "bitwidth must be one of 8, 16, 31"),
        ({"exclude": "fc"}, ValueError, "exclude must be a list"),
        ({"opt_level": "O0", "bitwidth": 16}, ValueError, "keeps every product in float32"),
        ({"rules": [{"modules": "fc", "widht": 8}]}, ValueError, "did you mean 'width'"),
        (7, ValueError, "recipe: "),
    ],
)
def test_wrong_recipe(host, recipe, error, message):
    with pytest.raises(error, match=message):
        host.Plugin(recipe=recipe)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"opt_level": "o0"}, ValueError, "did you mean 'O0'"),
        ({"bitwidth": 9}, ValueError, "bitwidth must be one of 8, 16, 31"),
        ({"bitwidth": 31, "max_bitwidth": 8}, ValueError, "over max_bitwidth"),
        ({"steps_per_epoch": 0}, ValueError, "steps_per_epoch"),
        ({"settings": {"bitwith": 8}}, ValueError, "did you mean 'bitwidth'"),
        ({"bitwith": 8}, TypeError, "bitwith"),
        ({"exclude": "fc"}, TypeError, r"write \['fc'\]"),
    ],
)
def test_bad_arguments_at_construction(host, arguments, error, message):
    with pytest.raises(error, match=message):
        host.Plugin(**arguments)


def test_repr_shows_the_settings(host):
    plugin = host.Plugin("O2", bitwidth=16, exclude=["a"], loss_scale="dynamic", settings={"gamma": 1.0})
    shown = repr(plugin)
    assert shown.startswith("CnmixPlugin(opt_level='O2', bitwidth=16, gamma=1.0, rules=(Rule(modules=('a',)")
    assert "loss_scale='dynamic') for " in shown
