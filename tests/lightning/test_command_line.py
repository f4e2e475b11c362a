"""The plugin in LightningCLI's files and on its command line."""

import importlib

import pytest
import yaml
from hosts import BATCHES, QUIET, loader
from torch import nn

from cnmix.nn import QuantizedLinear, quantized_modules

# Lightning calls parts of jsonargparse that are deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

RECIPE = {"opt_level": "O2", "rules": [{"types": "Conv2d", "width": 16}], "exclude": ["bn"]}


@pytest.fixture
def run(host, tmp_path, monkeypatch):
    """Runs LightningCLI with these arguments and this configuration's plugins; returns the client."""
    monkeypatch.setattr("sys.argv", ["program"])
    cli = importlib.import_module(f"{host.pl.__name__}.cli")

    class Data(host.pl.LightningDataModule):
        def train_dataloader(self):
            return loader()

    quiet = {**QUIET, "default_root_dir": str(tmp_path)}

    def start(*args, plugins=None):
        trainer = {**quiet} if plugins is None else {**quiet, "plugins": plugins}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
        return cli.LightningCLI(
            host.Task,
            Data,
            args=["fit", "--config", str(tmp_path / "config.yaml"), *args],
            save_config_callback=None,
            seed_everything_default=False,
        )

    return start


def plugin_of(client, host):
    plugin = client.trainer.precision_plugin
    assert type(plugin) is host.Plugin
    return plugin


@pytest.mark.parametrize("several", [False, True])
def test_file(run, host, several):
    entry = {
        "class_path": f"cnmix.{host.name}.CnmixPlugin",
        "init_args": {
            "opt_level": "O2",
            "exclude": ["conv"],
            "rules": [{"modules": "fc", "width": 16}, {"modules": ["fc"], "operands": "grad_output", "gamma": 1.0}],
            "activation_dtype": "float16",
            "loss_scale": 64,
            "settings": {"rounding": "half_up"},
        },
    }
    client = run(plugins=[entry] if several else entry)
    plugin = plugin_of(client, host)
    assert [fqn for fqn, _ in quantized_modules(client.model)] == ["fc"]
    configs = client.model.fc.quantizers.configs
    assert [(each.bitwidth, each.gamma, each.rounding) for each in configs.values()] == [
        (16, 2.0, "half_up"),
        (16, 2.0, "half_up"),
        (16, 1.0, "half_up"),
    ]
    assert plugin.loss_scale == 64
    assert len(client.model.seen) == BATCHES


@pytest.mark.parametrize("kind", ["mapping", "recipe", "path"])
def test_recipe(run, host, tmp_path, kind):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"cnmix": RECIPE}))
    recipe = {"mapping": RECIPE, "recipe": {"cnmix": RECIPE}, "path": str(tmp_path / "recipe.yaml")}[kind]
    client = run(plugins={"class_path": f"cnmix.{host.name}.CnmixPlugin", "init_args": {"recipe": recipe}})
    assert plugin_of(client, host).opt_level == "O2"
    assert client.model.conv.quantizers.config.bitwidth == 16


@pytest.mark.parametrize("operator", ["=", "+="])
def test_arguments(run, host, operator):
    client = run(
        f"--trainer.plugins{operator}cnmix.{host.name}.CnmixPlugin",
        "--trainer.plugins.opt_level=O3",
        "--trainer.plugins.loss_scale=dynamic",
        "--trainer.plugins.steps_per_epoch=50",
    )
    assert plugin_of(client, host).opt_level == "O3"
    assert isinstance(client.model.fc, QuantizedLinear)
    assert client.model.seen[0] == {50}


def test_baseline_over_a_file(run, host):
    entry = {"class_path": f"cnmix.{host.name}.CnmixPlugin", "init_args": {"recipe": RECIPE}}
    client = run("--trainer.plugins.opt_level=O0", plugins=entry)
    assert plugin_of(client, host).opt_level == "O0"
    assert type(client.model.fc) is nn.Linear


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"opt_level": "o2"}, "unknown opt_level 'o2': this version has O0, O1, O2, O3; did you mean 'O2'"),
        ({"recipe": {"opt_levle": "O2"}}, "did you mean 'opt_level'"),
        ({"exclude": "fc"}, "exclude"),
        ({"bitwith": 8}, "bitwith"),
    ],
)
def test_wrong_arguments(run, host, capsys, arguments, message):
    with pytest.raises((ValueError, SystemExit)) as caught:
        run(plugins={"class_path": f"cnmix.{host.name}.CnmixPlugin", "init_args": arguments})
    assert message in str(caught.value) + capsys.readouterr().err


def test_help_has_the_documentation_of_each_argument(run, host, capsys):
    with pytest.raises(SystemExit):
        run(f"--trainer.plugins.help=cnmix.{host.name}.CnmixPlugin")
    shown = " ".join(capsys.readouterr().out.split())
    assert '--trainer.plugins.opt_level OPT_LEVEL "O0" to "O3", see' in shown
    assert "names of modules to leave in float32" in shown
    assert "a recipe's file, or a mapping" in shown
