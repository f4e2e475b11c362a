import csv
import importlib
import math
import pickle
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from callback_runs import BATCHES, Kept, loader, looking, make_task, make_trainer, same

import cnmix
from cnmix import kernels
from cnmix.nn import quantized_modules

NAMES = ("bits", "position", "interval", "error", "saturation", "underflow")


def test_what_is_logged(package, tmp_path):
    task, kept = make_task(package), Kept(package)
    tensors = {}

    class Watch(package.pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            tensors[batch_idx] = {"weight": task.fc[0].weight.detach().clone()}

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            states = {(fqn, name): q.state_dict() for fqn, m in quantized_modules(task) for name, q in m.quantizers}
            tensors[batch_idx]["states"] = states

    def note(module, args, output):
        step = task.trainer.global_step
        tensors[step]["input"] = args[0].detach().clone()
        output.register_hook(lambda grad: tensors[step].update(grad_output=grad.clone()))

    task.fc[0].register_forward_hook(note)
    # The step's own state after it: of the callbacks that run at a batch's end, this one is the first.
    make_trainer(package, tmp_path, Watch(), package.Monitor(every_n_steps=4), logger=kept.logger).fit(task, loader())
    assert kept.steps == [0, 4]
    for step, row in kept.rows:
        states = tensors[step]["states"]
        assert set(row) == {f"cnmix/{fqn}/{operand}/{name}" for fqn, operand in states for name in NAMES}
        for (fqn, operand), state in states.items():
            for name in NAMES[:4]:
                assert row[f"cnmix/{fqn}/{operand}/{name}"] == state[name]
        for operand in ("input", "weight", "grad_output"):
            x, state = tensors[step][operand], states["fc.0", operand]
            expected = kernels.shares(x, kernels.quantize_measured(x, state["bits"], state["position"])[0])
            found = tuple(row[f"cnmix/fc.0/{operand}/{name}"] for name in ("saturation", "underflow"))
            assert found == expected
    assert looking(task) == []
    plain = make_task(package)
    make_trainer(package, tmp_path).fit(plain, loader())
    assert same(task, plain)  # to look changes nothing
    assert cnmix.state_dict(task) == cnmix.state_dict(plain)


def test_files_of_two_loggers(package, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    task = make_task(package, skips=(0, 1, 2, 3))  # `extra` has its first position late, and new columns with it
    folder = {"save_dir": tmp_path, "name": "a", "version": "b"}
    kinds = (package.loggers.CSVLogger, package.loggers.TensorBoardLogger)
    several = [kinds[0](**folder, flush_logs_every_n_steps=1), kinds[1](**{**folder, "name": "c"})]
    make_trainer(package, tmp_path, package.Monitor(every_n_steps=2), logger=several).fit(task, loader())

    with open(tmp_path / "a" / "b" / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["cnmix/conv/input/bits"]]
    assert [row["step"] for row in rows] == ["0", "2", "4"]
    everything = {f"cnmix/{fqn}/{operand}/{name}" for fqn in ("conv", "fc.0", "fc.2", "extra")
                  for operand in ("input", "weight", "grad_output") for name in NAMES}  # fmt: skip
    assert set(rows[0]) == {"step", *everything}
    assert [row["cnmix/extra/input/position"] != "" for row in rows] == [False, False, True]
    assert [row["cnmix/extra/input/saturation"] != "" for row in rows] == [False, False, True]
    assert [row["cnmix/extra/input/bits"] for row in rows] == ["8"] * 3

    events = EventAccumulator(str(tmp_path / "c" / "b")).Reload()
    scalars = [key for key in events.Tags()["scalars"] if key.startswith("cnmix/")]
    assert set(scalars) == everything
    for key in scalars:
        drawn = {event.step: event.value for event in events.Scalars(key)}
        written = {int(row["step"]): float(row[key]) for row in rows if row[key]}
        assert drawn == pytest.approx(written, rel=1e-6)


@pytest.mark.parametrize(
    ("modules", "operands", "count"),
    [
        ([], [], 12),
        (["conv"], [], 3),
        (["fc"], ["weight"], 2),
        (["fc.*", "conv"], ["input", "grad_output"], 6),
        (["fc.0", "fc"], [], 6),
    ],
)
def test_chosen_modules_and_operands(package, tmp_path, modules, operands, count):
    task, kept = make_task(package), Kept(package)
    monitor = package.Monitor(modules=modules, operands=operands)
    make_trainer(package, tmp_path, monitor, logger=kept.logger).fit(task, loader())
    assert len(kept.rows[0][1]) == count * len(NAMES)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every_n_steps": 0}, ValueError, "at least 1, got 0"),
        ({"every_n_steps": 2.0}, ValueError, "whole number of steps"),
        ({"modules": "fc"}, TypeError, r"write \['fc'\]"),
        ({"operands": "weight"}, TypeError, r"write \['weight'\]"),
        ({"operands": ["weigth"]}, ValueError, "did you mean 'weight'"),
    ],
)
def test_bad_arguments(package, arguments, error, message):
    with pytest.raises(error, match=message):
        package.Monitor(**arguments)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cnov", "no module is called 'cnov': did you mean 'conv'"),
        ("fc.1", "nothing in 'fc.1' computes in fixed point"),
    ],
)
def test_unknown_modules_are_refused_before_training(package, tmp_path, name, message):
    task = make_task(package)
    with pytest.raises(ValueError, match=message):
        make_trainer(package, tmp_path, package.Monitor(modules=["conv", name])).fit(task, loader())
    assert task.global_step == 0


def test_a_word_where_there_is_nothing_to_say(package, tmp_path, caplog, console):
    kept = Kept(package)
    watching = package.Monitor(modules=["cnov"]), package.Summary()
    make_trainer(package, tmp_path, *watching, logger=kept.logger).fit(make_task(package, converted=False), loader())
    assert kept.rows == []
    assert "CnmixMonitor has nothing to log: nothing of the model computes in fixed point" in caplog.text
    assert "CnmixSummary has nothing to print: nothing of the model computes in fixed point" in caplog.text
    assert console.export_text() == ""
    task = make_task(package)
    make_trainer(package, tmp_path, package.Monitor(every_n_steps=1)).fit(task, loader())
    assert "CnmixMonitor has nowhere to log to: the Trainer has no logger" in caplog.text
    assert {q.shares for _, module in quantized_modules(task) for _, q in module.quantizers} == {None}


def test_accumulated_batches_are_logged_once(package, tmp_path):
    task, kept = make_task(package), Kept(package)
    trainer = make_trainer(
        package, tmp_path, package.Monitor(2), logger=kept.logger, accumulate_grad_batches=2, max_epochs=2
    )
    trainer.fit(task, loader())
    assert trainer.global_step == BATCHES
    assert kept.steps == [0, 2, 4]
    assert all(not math.isnan(row["cnmix/conv/weight/underflow"]) for _, row in kept.rows)


@pytest.mark.parametrize(("every", "steps"), [(2, [0, 2, 4, 6, 8, 10]), (5, [0, 6, 10])])
def test_manual_optimization_with_several_steps_in_a_batch(package, tmp_path, every, steps):
    task, kept = make_task(package, optimizers=2), Kept(package)
    trainer = make_trainer(package, tmp_path, package.Monitor(every), logger=kept.logger)
    trainer.fit(task, loader())
    assert trainer.global_step == 2 * BATCHES
    assert kept.steps == steps
    assert "cnmix/fc.0/grad_output/underflow" in kept.rows[-1][1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(package, tmp_path, reentrant):
    rows = []
    for each in (None, reentrant):
        kept = Kept(package)
        task = make_task(package, reentrant=each)
        make_trainer(package, tmp_path, package.Monitor(2), logger=kept.logger).fit(task, loader())
        rows.append(kept.rows)
    assert rows[0] == rows[1]


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_resumed_run_logs_what_an_uninterrupted_one_does(package, tmp_path, epochs):
    whole, first, second = Kept(package), Kept(package), Kept(package)
    make_trainer(package, tmp_path, package.Monitor(4), logger=whole.logger, max_epochs=3).fit(
        make_task(package), loader()
    )
    task = make_task(package)
    trainer = make_trainer(package, tmp_path, package.Monitor(4), logger=first.logger, max_epochs=epochs)
    trainer.fit(task, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = make_task(package)
    cnmix.load_state_dict(cnmix.state_dict(task), resumed)
    trainer = make_trainer(package, tmp_path, package.Monitor(4), logger=second.logger, max_epochs=3)
    trainer.fit(resumed, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert first.rows + second.rows == whole.rows
    assert whole.steps == [0, 4, 8, 12, 16]


def test_nothing_stays_on_where_training_fails(package, tmp_path, console):
    task, kept = make_task(package, fails_at=2), Kept(package)
    watching = package.Monitor(1), package.ProgressBar(), package.Summary()
    with pytest.raises(RuntimeError, match="out of luck"):
        make_trainer(package, tmp_path, *watching, logger=kept.logger).fit(task, loader())
    assert kept.steps == [0, 1]
    assert looking(task) == []
    assert not watching[0]._watched
    assert not watching[1]._quantizers
    assert "Operands" not in console.export_text()


def test_an_operand_that_took_no_part_is_not_looked_at_later(package, tmp_path):
    task, kept = make_task(package, skips=(2, 3)), Kept(package)
    make_trainer(package, tmp_path, package.Monitor(2), logger=kept.logger).fit(task, loader())
    assert ["cnmix/extra/input/underflow" in row for _, row in kept.rows] == [True, False, True]
    assert ["cnmix/extra/input/position" in row for _, row in kept.rows] == [True, True, True]


def test_two_monitors(package, tmp_path):
    kept = Kept(package)
    watching = package.Monitor(2, modules=["conv"]), package.Monitor(3, operands=["input"])
    make_trainer(package, tmp_path, *watching, logger=kept.logger).fit(make_task(package), loader())
    assert kept.steps == [0, 0, 2, 3, 4]
    assert all("cnmix/conv/input/underflow" in row for _, row in kept.rows)


def test_only_rank_zero_logs_and_prints(package, console):
    task, kept = make_task(package), Kept(package)
    trainer = SimpleNamespace(is_global_zero=False, loggers=[kept.logger], global_step=0)
    monitor, table = package.Monitor(1), package.Summary()
    for each in (monitor, table):
        each.on_fit_start(trainer, task)
        each.on_train_start(trainer, task)
        each.on_train_batch_start(trainer, task, None, 0)
    assert looking(task) == []
    for each in (monitor, table):
        each.on_train_batch_end(trainer, task, None, None, 0)
        each.on_fit_end(trainer, task)
        each.teardown(trainer, task, "fit")
    assert kept.rows == []
    assert console.export_text() == ""
    with pytest.raises(ValueError, match="cnov"):  # or the other ranks would wait for it
        package.Monitor(modules=["cnov"]).on_fit_start(trainer, task)


def test_callbacks_are_picklable(package):
    for each in (package.Monitor(7, ["fc"]), package.ProgressBar(), package.Summary(3)):
        again = pickle.loads(pickle.dumps(each))
        assert vars(again) == vars(each)


def test_command_line(package):
    parser = pytest.importorskip("jsonargparse").ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[package.pl.Callback])
    module = package.Monitor.__module__.removesuffix(".callbacks")
    given = [
        {"class_path": f"{module}.CnmixMonitor", "init_args": {"every_n_steps": 5, "modules": ["fc"]}},
        {"class_path": f"{module}.CnmixProgressBar", "init_args": {"leave": True}},
        {"class_path": f"{module}.CnmixSummary", "init_args": {"max_rows": 7}},
    ]
    parsed = parser.parse_object({"callbacks": given})
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes
    monitor, bar, table = build(parsed).callbacks
    assert (type(monitor), monitor.every_n_steps, monitor.modules) == (package.Monitor, 5, ("fc",))
    assert (type(bar), type(table), table.max_rows) == (package.ProgressBar, package.Summary, 7)
    with pytest.raises(Exception, match="every_n_steps"):
        parser.parse_object({"callbacks": [{**given[0], "init_args": {"every_n_steps": "often"}}]})


def test_the_example_of_the_documentation(tmp_path, monkeypatch, capsys):
    pl, package = importlib.import_module("lightning.pytorch"), SimpleNamespace()
    package.pl = pl
    text = (Path(__file__).resolve().parents[2] / "docs" / "lightning.md").read_text()
    (block,) = (each for each in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "CnmixMonitor(" in each)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {"task": make_task(package, converted=False), "loader": loader()}
        exec(block, names)
    assert names["trainer"].global_step == 2 * BATCHES
    (table,) = tmp_path.glob("runs/lightning_logs/*/metrics.csv")
    with open(table, newline="") as file:
        (row,) = [row for row in csv.DictReader(file) if row.get("cnmix/conv/input/bits")]
    assert row["step"] == "0"
    assert list(tmp_path.glob("runs/lightning_logs/*/events.out.tfevents.*"))
    assert "Operands in fixed point" in capsys.readouterr().out
    assert looking(names["task"]) == []
