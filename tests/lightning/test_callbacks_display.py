import functools
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from callback_runs import loader, make_task, make_trainer
from torch import nn

import cnmix
from cnmix.nn import quantized_modules
from cnmix.plugins import callbacks


@pytest.mark.parametrize("width", [80, 100])
def test_progress_bar(package, tmp_path, console, monkeypatch, width):
    console.width = width
    task, shown = make_task(package), []
    clock = SimpleNamespace(now=50.0)
    for name, each in (("training_step", 1.0), ("validation_step", 100.0)):

        def slow(*args, own, each):
            clock.now += each
            return own(*args)

        monkeypatch.setattr(task, name, functools.partial(slow, own=getattr(task, name), each=each))
    monkeypatch.setattr(callbacks, "monotonic", lambda: clock.now)

    class Bar(package.ProgressBar):
        def get_metrics(self, trainer, pl_module):
            shown.append(super().get_metrics(trainer, pl_module))
            return shown[-1]

    settings = {"val_check_interval": 3, "accumulate_grad_batches": 2, "max_epochs": 2}
    make_trainer(package, tmp_path, Bar(), **settings).fit(task, loader(), loader())
    bits = [q.state.bits for _, module in quantized_modules(task) for _, q in module.quantizers]
    assert shown[-1]["width"] == f"{sum(bits) / len(bits):.1f} bit"
    assert "steps/s" not in shown[0]  # no step yet
    rates = [each["steps/s"] for each in shown if "steps/s" in each]
    assert set(rates) == {"0.50"}  # validation does not count
    text = console.export_text()
    assert f"width: {shown[-1]['width']}" in text
    assert re.search(r"steps/s:\s+0.50", text)
    assert "it/s" not in text
    assert max(map(len, text.splitlines())) <= width


def test_progress_bar_without_a_terminal(package, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "")
    monkeypatch.setenv("COLUMNS", "80")
    task = make_task(package)
    make_trainer(package, tmp_path, package.ProgressBar(), package.Summary()).fit(task, loader())
    text = capsys.readouterr().out
    assert "6/6" in text
    assert " bit" in text
    assert text.index("6/6") < text.index("Operands in fixed point")
    assert "\x1b" not in text


def test_own_metrics_go_before_those_of_the_bar(package, tmp_path, console):
    task = make_task(package)
    shown = []

    class Watch(package.pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.log("width", 2.0, prog_bar=True)

        def on_train_epoch_end(self, trainer, pl_module):
            shown.append(trainer.progress_bar_callback.get_metrics(trainer, pl_module)["width"])

    make_trainer(package, tmp_path, package.ProgressBar(), Watch()).fit(task, loader())
    assert shown == [2.0]


def make_net(count):
    torch.manual_seed(0)
    net = nn.ModuleDict({"encoder": nn.Sequential(*[nn.Sequential(nn.Linear(4, 4)) for _ in range(count)])})
    cnmix.initialize(net, opt_level="O1", max_bitwidth=8, threshold=1e-3)
    return net


@pytest.mark.parametrize("width", [80, 100])
def test_summary(package, tmp_path, console, width):
    console.width = width
    task = make_task(package)
    table = package.Summary()
    trainer = make_trainer(package, tmp_path, table)
    trainer.fit(task, loader())
    text = console.export_text()
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert lines[1].split() == ["module", "input", "weight", "grad_output", "updates", "interval", "error"]
    for line, (fqn, module) in zip(lines[3:], quantized_modules(task), strict=False):
        states = [quantizer.state for _, quantizer in module.quantizers]
        cells = [cell for state in states for cell in (f"int{state.bits}", f"2^{state.position}")]
        assert line.split() == [fqn, *cells, "18", "1", f"{max(state.error for state in states):.2g}"]
    assert lines[7].startswith("all 12 operands: ")
    assert lines[8] == "6 optimizer steps; 72 updates in 72 quantizations (100.0%)"
    assert len(lines) == 9
    trainer.validate(task, loader(), verbose=False)
    assert console.export_text() == ""  # at the end of fit alone


@pytest.mark.parametrize("width", [80, 100])
def test_summary_of_many_modules(package, console, width):
    console.width = width
    net = make_net(8)
    for index in range(8):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(index), requires_grad=True)
        net["encoder"][index](x).square().sum().backward()
    trainer = SimpleNamespace(is_global_zero=True, global_step=12345)
    table = package.Summary(max_rows=3)
    table.on_fit_end(trainer, net)
    table.teardown(trainer, net, "fit")
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert [line.split()[0] for line in lines[3:6]] == ["encoder.0.0", "encoder.1.0", "encoder.2.0"]
    assert lines[6].startswith("and 5 more modules: ")
    assert "largest error 0.0" in lines[6]
    assert lines[8] == "12,345 optimizer steps; 24 updates in 24 quantizations (100.0%)"
    exceeding = sum(q.state.exceeds_max_bitwidth for _, m in quantized_modules(net) for _, q in m.quantizers)
    assert exceeding
    assert lines[9] == f"! error over its threshold at max_bitwidth: {exceeding} of 24 operands"
    marked = sum(q.state.exceeds_max_bitwidth for i in range(3) for _, q in net["encoder"][i][0].quantizers)
    assert sum(line.count("!") for line in lines[3:6]) == marked


def test_summary_of_a_model_that_was_not_trained(package, console):
    table = package.Summary()
    trainer = SimpleNamespace(is_global_zero=True, global_step=0)
    table.on_fit_end(trainer, None)
    table.teardown(trainer, make_net(1), "fit")
    assert "int8 –" in console.export_text()


@pytest.mark.parametrize("rows", [0, 1.5, True])
def test_bad_number_of_rows(package, rows):
    with pytest.raises(ValueError, match="whole number of modules, at least 1"):
        package.Summary(rows)


def test_without_rich():
    code = (
        "import importlib.metadata as m, importlib.util as u, sys\n"
        "sys.meta_path.insert(0, type('Hide', (), {'find_spec': staticmethod(lambda name, *rest: (_ for _ in ()).throw("
        "ModuleNotFoundError(name, name=name)) if name.split('.')[0] == 'rich' else None)}))\n"
        "real, spec = m.distribution, u.find_spec\n"
        "def distribution(name):\n"
        "    if name == 'rich': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.distribution = distribution\n"
        "u.find_spec = lambda name, *rest: None if name == 'rich' else spec(name, *rest)\n"
        "from cnmix.lightning import CnmixMonitor, CnmixProgressBar, CnmixSummary\n"
        "CnmixMonitor()\n"
        "for kind in (CnmixProgressBar, CnmixSummary):\n"
        "    try: kind()\n"
        "    except ModuleNotFoundError as error: print('pip install' in str(error), 'rich' in str(error))\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"] * 4
