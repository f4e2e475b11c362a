"""CnmixTelemetry under both of Lightning's packages."""

import json

import pytest
from callback_runs import BATCH, BATCHES, Kept, loader, make_task, make_trainer, same

import cnmix
from cnmix.nn import quantizer_sets


def read(file):
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return lines, lambda kind: [line for line in lines if line["kind"] == kind]


def test_a_run_is_recorded_beside_its_metrics(package, tmp_path):
    task, plain = make_task(package), make_task(package)
    logger = package.loggers.CSVLogger(tmp_path, name="", version="")
    make_trainer(package, tmp_path, package.Telemetry(every_n_steps=4), logger=logger, max_epochs=2).fit(task, loader())
    lines, of = read(tmp_path / "telemetry.jsonl")
    assert (lines[0]["kind"], lines[0]["level"], lines[0]["first_step"]) == ("run", "O1", 0)
    assert [line["module"] for line in of("operand")[::3]] == ["conv", "fc.0", "fc.2", "extra"]
    assert [line["step"] for line in of("time")] == [0, 4, 8]
    assert [(line["first"], line["last"]) for line in of("steps")] == [(1, 3), (5, 7), (9, 2 * BATCHES - 1)]
    assert len(of("sample")) == 36
    make_trainer(package, tmp_path / "plain", max_epochs=2).fit(plain, loader())
    assert same(task, plain)
    assert cnmix.state_dict(task) == cnmix.state_dict(plain)
    assert all(quantizer.listener is None for _, each in quantizer_sets(task) for _, quantizer in each)


def test_the_plugin_tells_level_and_epoch(package, tmp_path):
    plugin = __import__(f"cnmix.{package.pl.__name__.split('.')[0]}", fromlist=["CnmixPlugin"]).CnmixPlugin("O3")
    task = make_task(package, converted=False)
    callback = package.Telemetry(path=tmp_path / "own.jsonl", part="fc", rules=[{"modules": "2"}])
    make_trainer(package, tmp_path, callback, plugins=[plugin]).fit(task, loader())
    lines, of = read(tmp_path / "own.jsonl")
    assert (lines[0]["level"], lines[0]["steps_per_epoch"]) == ("O3", BATCHES)
    assert [line["module"] for line in of("operand")] == ["0"] * 3 + ["2"] * 3
    assert {line["id"] for line in of("sample")} == {3, 4, 5}


def test_accumulated_batches_are_one_step(package, tmp_path):
    callback = package.Telemetry(every_n_steps=2, path=tmp_path)
    make_trainer(package, tmp_path, callback, accumulate_grad_batches=3, max_epochs=2).fit(make_task(package), loader())
    _, of = read(tmp_path / "telemetry.jsonl")
    assert [line["step"] for line in of("time")] == [0, 2]
    conv = [(line["step"], line["at"]) for line in of("decision") if line["id"] == 0]
    assert conv[:4] == [(0, 0), (0, 1), (0, 2), (1, 3)]
    assert (
        sum(of("time")[0]["macs"].values())
        == 3 * sum(3 * BATCH * a * b for a, b in ((64, 8), (8, 3), (3, 3))) + 3 * 2 * BATCH * 4 * 16 * 9
    )


def test_manual_optimization_and_the_monitor_beside_it(package, tmp_path):
    kept = Kept(package)
    callbacks = package.Monitor(every_n_steps=4), package.Telemetry(every_n_steps=3, path=tmp_path)
    make_trainer(package, tmp_path, *callbacks, logger=kept.logger).fit(make_task(package, optimizers=2), loader())
    _, of = read(tmp_path / "telemetry.jsonl")
    assert [line["step"] for line in of("time")] == [0, 4, 6, 10]  # two optimizers: the steps are even
    assert kept.steps == [0, 4, 8]
    for step, row in kept.rows:
        for line in of("sample"):
            if line["step"] == step and line["id"] == 0:
                assert (row["cnmix/conv/input/saturation"], row["cnmix/conv/input/underflow"]) == (
                    line["saturation"],
                    line["underflow"],
                )
    assert all("cnmix/conv/input/saturation" in row for _, row in kept.rows)


def test_a_failure_leaves_the_file_and_the_model(package, tmp_path):
    task = make_task(package, fails_at=4)
    trainer = make_trainer(package, tmp_path, package.Telemetry(every_n_steps=100, path=tmp_path))
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.fit(task, loader())
    _, of = read(tmp_path / "telemetry.jsonl")
    assert of("steps")[0]["last"] == 3
    assert all(quantizer.listener is None for _, each in quantizer_sets(task) for _, quantizer in each)


def test_a_resumed_run_goes_on_in_the_file(package, tmp_path):
    def fit(epochs, **options):
        callback = package.Telemetry(every_n_steps=4, path=tmp_path)
        trainer = make_trainer(package, tmp_path, callback, max_epochs=epochs, enable_checkpointing=True)
        task = make_task(package)
        trainer.fit(task, loader(), **options)
        return trainer

    file = tmp_path / "part.ckpt"
    fit(1).save_checkpoint(file)
    fit(2, ckpt_path=str(file))
    _, of = read(tmp_path / "telemetry.jsonl")
    assert [line["first_step"] for line in of("run")] == [0, BATCHES]
    assert [line["step"] for line in of("time")] == [0, 4, 8]


def test_wrong_arguments(package, tmp_path):
    with pytest.raises(ValueError, match="every_n_steps must be a whole number of steps, at least 1, got 0"):
        package.Telemetry(every_n_steps=0)
    with pytest.raises(TypeError, match="must be a list of mappings"):
        package.Telemetry(rules={"modules": "fc"})
    trainer = make_trainer(package, tmp_path, package.Telemetry(rules=[{"modules": "convs"}], path=tmp_path))
    with pytest.raises(ValueError, match="no module is called 'convs': did you mean 'conv'"):
        trainer.fit(make_task(package), loader())
