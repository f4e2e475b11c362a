"""What is refused, with the words that say what to write instead."""

import re

import pytest
import torch
from hosts import PACKAGES, Host, loader
from torch import nn

HOSTS = {
    "lightning": ("lightning.pytorch.Trainer", "lightning.fabric.Fabric"),
    "pytorch_lightning": ("pytorch_lightning.Trainer", "lightning_fabric.Fabric"),
}


def refused(make, *words):
    # Some are of a class of Lightning's, of which each package has a copy.
    with pytest.raises(Exception, match=re.escape(words[0])) as caught:
        make()
    for each in words:
        assert each in str(caught.value)


@pytest.fixture
def other(host):
    return Host(next(name for name in PACKAGES if name != host.name))


def test_class_instead_of_an_instance(host, tmp_path):
    words = "Found invalid type for plugin the class CnmixPlugin (write CnmixPlugin(), an instance)"
    refused(lambda: host.trainer(tmp_path, [host.Plugin]), words)
    refused(lambda: host.trainer(tmp_path, host.Plugin), words)
    refused(
        lambda: host.start(host.FabricPlugin), "the class FabricCnmixPlugin (write FabricCnmixPlugin(), an instance)"
    )


def test_plugin_of_the_other_package(host, other, tmp_path):
    refused(
        lambda: host.trainer(tmp_path, other.Plugin("O2")),
        f"CnmixPlugin(opt_level='O2') for {HOSTS[other.name][0]}(plugins=...)",
        f"for {HOSTS[host.name][0]}: from cnmix.{host.name} import CnmixPlugin",
    )
    refused(
        lambda: host.start(other.FabricPlugin()),
        f"for {HOSTS[host.name][1]}: from cnmix.{host.name} import FabricCnmixPlugin",
    )


def test_plugin_for_fabric_in_the_trainer(host, tmp_path):
    refused(
        lambda: host.trainer(tmp_path, host.FabricPlugin()),
        f"FabricCnmixPlugin(opt_level='O1') for {HOSTS[host.name][1]}(plugins=...)",
        f"for {HOSTS[host.name][0]}: from cnmix.{host.name} import CnmixPlugin",
    )


@pytest.mark.parametrize("module", ["plain", "task"])
def test_plugin_for_the_trainer_in_fabric(host, module):
    model = nn.Linear(2, 2) if module == "plain" else host.Task()
    refused(
        lambda: host.start(host.Plugin()).setup(model, torch.optim.SGD(model.parameters(), lr=0.1)),
        f"CnmixPlugin is for the Trainer, and this {type(model).__name__} has none: for Fabric, "
        f"from cnmix.{host.name} import FabricCnmixPlugin",
    )
    assert not hasattr(model, "quantizers")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_precision_beside_the_plugin(host, tmp_path, precision):
    words = (f"Received both `precision={precision}` and `plugins=", ", without precision=, ", "Choose one")
    refused(lambda: host.trainer(tmp_path, host.Plugin(), precision=precision), *words)
    refused(lambda: host.start(host.FabricPlugin(), precision=precision), *words)


def test_plugin_as_precision(host, tmp_path):
    words = f"Precision CnmixPlugin(opt_level='O1') for {HOSTS[host.name][0]}(plugins=...) is invalid"
    refused(lambda: host.trainer(tmp_path, None, precision=host.Plugin()), words)


def test_two_plugins(host, tmp_path):
    words = "Received multiple values for Precision flags in `plugins`"
    refused(lambda: host.trainer(tmp_path, [host.Plugin(), host.Plugin("O2")]), words)
    strategy = host.pl.strategies.SingleDeviceStrategy(device=torch.device("cpu"), precision_plugin=host.Plugin())
    words = "precision set through both strategy class and plugins, choose one"
    refused(lambda: host.trainer(tmp_path, host.Plugin(), strategy=strategy, accelerator="auto"), words)


def test_fully_sharded(host):
    words = (
        "The FSDP strategy can only work with the `FSDPPrecision` plugin",
        "for FSDP with ModelParallelStrategy in place of 'fsdp'",
    )
    refused(lambda: host.pl.strategies.FSDPStrategy(precision_plugin=host.Plugin()), *words)
    refused(lambda: host.fabric.strategies.FSDPStrategy(precision=host.FabricPlugin()), *words)


def test_classes_of_ones_own_say_what_they_are(host, tmp_path):
    class Mine(host.Plugin):
        pass

    assert repr(Mine()) == "Mine(opt_level='O1')"
    task = host.Task()
    host.trainer(tmp_path, Mine()).fit(task, loader())
    assert "quantizers" in task.fc.__dict__


def test_plugin_is_true(host):
    assert bool(host.Plugin())
    assert bool(host.FabricPlugin())
    assert host.Plugin.precision == host.FabricPlugin.precision == "32-true"
    assert host.Plugin.__qualname__ == "CnmixPlugin"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"opt_lvl": "O1"}, "unknown argument of CnmixPlugin: 'opt_lvl': did you mean 'opt_level'"),
        ({"rounding": "stochastic"}, "CnmixPlugin takes rounding among its settings: settings={'rounding': ...}"),
    ],
)
def test_unknown_arguments(host, arguments, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        host.Plugin(**arguments)


def test_an_argument_given_twice(host):
    with pytest.raises(ValueError, match="bitwidth is given by itself and in settings: give it once"):
        host.Plugin(bitwidth=8, settings={"bitwidth": 16})
