import logging
import multiprocessing
import os
import random
import sys
import tempfile
import time

import pytest
import torch
from hosts import BATCH, BATCHES, data, loader, operands, same, steps_seen
from torch import nn

from cnmix import checkpoint, inference


class StatefulLoader:
    """Batches in an order of each epoch's own, which go on where ``state_dict`` was taken."""

    def __init__(self):
        self.dataset, self.epoch, self.position = data(), 0, 0

    def __len__(self):
        return BATCHES

    def __iter__(self):
        if self.position == BATCHES:  # nobody asked for the end of the epoch before
            self.epoch, self.position = self.epoch + 1, 0
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(self.epoch)).tolist()
        while self.position < BATCHES:
            chosen = order[self.position * BATCH : (self.position + 1) * BATCH]
            self.position += 1
            yield torch.utils.data.default_collate([self.dataset[index] for index in chosen])

    def state_dict(self):
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state):
        self.epoch, self.position = state["epoch"], state["position"]


def keep(host, folder, **settings):
    """Options of a Trainer that saves."""
    return {
        "enable_checkpointing": True,
        "callbacks": [host.pl.callbacks.ModelCheckpoint(folder, **settings)],
    }


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "cnmix"]


def evaluate(task):
    with torch.no_grad():
        return torch.cat([task.eval()(batch[0]) for batch in loader()])


@pytest.mark.parametrize("saved_by", ["callback", "trainer"])
def test_weights_only(host, tmp_path, caplog, saved_by):
    task, file = host.Task(), tmp_path / "weights.ckpt"
    options = keep(host, tmp_path, filename="weights", save_weights_only=True) if saved_by == "callback" else {}
    running = host.trainer(tmp_path, host.Plugin(), **options)
    running.fit(task, loader())
    if saved_by == "trainer":
        running.save_checkpoint(file, weights_only=True)
    saved = torch.load(file, weights_only=True)
    plain = host.Task(seed=4)
    plain.load_state_dict(saved["state_dict"], strict=True)
    assert type(plain.fc) is nn.Linear
    assert same(plain, task)
    with pytest.raises(
        ValueError, match=r"lacks cnmix \(Lightning saves it for CnmixPlugin, but not with weights only"
    ):
        inference.prepare(host.Task(), file)
    assert said(caplog) == []

    other = host.Task(seed=8)
    host.trainer(tmp_path, host.Plugin()).test(other, loader(), ckpt_path=file, verbose=False)
    assert same(other, task)
    assert steps_seen(other) == {0}
    (line,) = said(caplog)
    assert line.endswith("without a cnmix state (of a run without the plugin, or weights only): operands start anew")
    caplog.clear()
    running.test(task, loader(), ckpt_path=file, verbose=False)
    (line,) = said(caplog)
    assert line.endswith("operands stay as they are, not as they were when it was saved")
    assert steps_seen(task) == {BATCHES}
    caplog.clear()
    host.trainer(tmp_path, host.Plugin("O0")).test(host.Task(), loader(), ckpt_path=file, verbose=False)
    host.trainer(tmp_path, None).test(host.Task(), loader(), ckpt_path=file, verbose=False)
    assert said(caplog) == []
    with pytest.raises(KeyError, match="checkpoint contains only the model"):
        host.trainer(tmp_path, host.Plugin(), max_epochs=2).fit(host.Task(), loader(), ckpt_path=file)


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
@pytest.mark.parametrize("way", ["accumulated", "manual", "dynamic loss scale"])
@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_resume_in_the_middle_of_an_epoch(host, tmp_path, level, way):
    def fit(task, **options):
        scale = "dynamic" if way == "dynamic loss scale" else None
        plugin = host.Plugin(level, loss_scale=scale, settings={"rounding": "stochastic"})
        trainer = keep(host, tmp_path, every_n_train_steps=4, save_top_k=-1)
        accumulated = 2 if way == "accumulated" else 1
        running = host.trainer(tmp_path, plugin, max_epochs=3, accumulate_grad_batches=accumulated, **trainer)
        running.fit(task, StatefulLoader(), **options)
        return task

    manual = way == "manual"
    whole = fit(host.Task(manual=manual))
    step = 4 if way == "accumulated" else 8  # the second batch of the second epoch, after it
    file = next(tmp_path.glob(f"*-step={step}.ckpt"))
    position = torch.load(file, weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert position == [{"epoch": 1, "position": 2}]
    resumed = fit(host.Task(seed=8, manual=manual), ckpt_path=file)
    assert same(whole, resumed)
    assert operands(whole) == operands(resumed)
    assert steps_seen(resumed) == {3 * BATCHES}


@pytest.mark.parametrize("level", ["O1", "O3"])
def test_evaluation_of_a_checkpoint_uses_its_formats(host, tmp_path, level):
    def keeping():
        return host.trainer(tmp_path, host.Plugin(level), **keep(host, tmp_path, filename="kept", save_last=True))

    task, running = host.Task(), keeping()
    running.fit(task, loader())
    expected = evaluate(task)
    assert not torch.equal(expected, evaluate(host.Task()))
    for path in ("best", "last", tmp_path / "kept.ckpt"):
        for stage in ("test", "validate", "predict"):
            fresh = host.Task(seed=8)
            other = running if path == "best" else keeping()
            options = {} if stage == "predict" else {"verbose": False}
            answers = getattr(other, stage)(fresh, loader(), ckpt_path=path, **options)
            assert torch.equal(evaluate(fresh), expected)
            assert operands(fresh) == operands(task)
            if stage == "predict":
                assert torch.equal(torch.cat(answers), expected)


def killed_at_any_moment(save, file, count):
    """Kills a process that saves versions over one another, again and again; the file must be whole each time."""
    context, delays, latest = multiprocessing.get_context("fork"), random.Random(0), 0

    def save_on(first, writer):
        save(first)
        writer.send(first)
        for version in range(first + 1, first + 10_000):
            save(version)

    for _ in range(count):
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=save_on, args=(latest + 1, writer))
        process.start()
        assert reader.poll(60)
        time.sleep(delays.uniform(0.0, 0.02))
        process.kill()
        process.join()
        saved = torch.load(file, weights_only=True)
        assert all(bool((weight == saved["version"]).all()) for weight in saved["state_dict"].values())
        assert saved["version"] > latest
        latest = saved["version"]


def test_what_is_no_local_path_is_left_to_lightning(host):
    saving = host.AtomicCheckpointIO()
    saving.save_checkpoint({"version": 1}, "memory://folder/a.ckpt")
    assert saving.load_checkpoint("memory://folder/a.ckpt") == {"version": 1}
    with pytest.raises(TypeError, match="storage_options"):
        saving.save_checkpoint({}, "a.ckpt", storage_options={})


def check_what_is_left(file):
    others = [name for name in os.listdir(file.parent) if name != file.name]
    assert all(name.startswith(f".{file.name}.") and name.endswith(".tmp") for name in others)


def fill(model, version):
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(version)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # of a process that may have threads
@pytest.mark.parametrize("temporary_files", ["on another file system", "beside"])
def test_kill_while_the_trainer_saves(host, tmp_path, monkeypatch, temporary_files):
    atomic = temporary_files != "beside"
    if atomic and os.path.isdir("/dev/shm"):
        monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    elif not atomic:  # as TMPDIR does; Lightning's own way is whole then
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    class Versioned(host.Task):
        def on_save_checkpoint(self, saved):
            saved["version"] = self.version

    task, file = Versioned(), tmp_path / "run" / "last.ckpt"
    task.fc.register_buffer("large", torch.zeros(50_000))
    plugins = [host.Plugin(), *([host.AtomicCheckpointIO()] if atomic else [])]
    running = host.trainer(tmp_path, plugins)
    running.fit(task, loader())

    def save(version):
        task.version = version
        fill(task, version)
        running.save_checkpoint(file)

    killed_at_any_moment(save, file, 30 if atomic else 10)
    check_what_is_left(file)
    assert checkpoint.load(file)["cnmix"]["models"][0]["modules"].keys() == {"conv", "fc"}


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_kill_while_cnmix_saves(tmp_path):
    model, file = nn.Linear(200, 200), tmp_path / "run" / "model.pt"

    def save(version):
        fill(model, version)
        checkpoint.save(file, model, version=version)

    killed_at_any_moment(save, file, 30)
    check_what_is_left(file)


@pytest.mark.parametrize("given", ["plugin", "its state"])
def test_fabric(host, net, batch, tmp_path, given):
    def start(seed):
        plugin = host.FabricPlugin("O2", loss_scale="dynamic", steps_per_epoch=3)
        fabric, models = host.start(plugin), [net(seed), net(seed + 1)]
        pairs = [fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)) for model in models]
        return fabric, plugin, models, pairs

    def train(fabric, pairs, count):
        for seed in range(count):
            for model, optimizer in pairs:
                optimizer.zero_grad()
                x, y = batch(seed)
                fabric.backward(nn.functional.cross_entropy(model(x), y))
                optimizer.step()

    def contents(plugin, pairs):
        (a, a_optimizer), (b, b_optimizer) = pairs
        own = plugin if given == "plugin" else plugin.state_dict()
        return {"state_dict": a, "b": b, "optimizers": [], "a_optimizer": a_optimizer, "b_optimizer": b_optimizer} | {
            "cnmix": own
        }

    fabric, plugin, models, pairs = start(0)
    train(fabric, pairs, 4)
    fabric.save(tmp_path / "run.ckpt", contents(plugin, pairs))
    train(fabric, pairs, 4)
    again, other, others, other_pairs = start(5)
    state = contents(other, other_pairs)
    again.load(tmp_path / "run.ckpt", state)
    if given != "plugin":
        other.load_state_dict(state["cnmix"])
    train(again, other_pairs, 4)
    for model, its in zip(models, others, strict=True):
        assert same(model, its)
        assert operands(model) == operands(its)
    assert plugin.state_dict() == other.state_dict()
    assert len(checkpoint.load(tmp_path / "run.ckpt")["cnmix"]["models"]) == 2


def test_fabric_checkpoint_goes_to_inference(host, net, batch, tmp_path):
    plugin, model = host.FabricPlugin(), net()
    fabric = host.fabric.Fabric(accelerator="cpu", devices=1, plugins=[plugin, host.AtomicCheckpointIO()])
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.05))
    fabric.backward(wrapped(batch()[0]).square().mean())
    optimizer.step()
    fabric.save(tmp_path / "run.ckpt", {"state_dict": wrapped, "optimizer": optimizer, "cnmix": plugin})
    prepared = inference.prepare(net(3), tmp_path / "run.ckpt")
    with torch.no_grad():
        assert torch.equal(prepared(batch(1)[0]), model.eval()(batch(1)[0]))


@pytest.mark.parametrize("direction", ["from a subclass", "to a subclass", "between subclasses"])
def test_subclass(host, tmp_path, caplog, direction):
    first = host.Plugin if direction == "to a subclass" else type("Mine", (host.Plugin,), {})
    second = host.Plugin if direction == "from a subclass" else type("Yours", (host.Plugin,), {})
    whole, file = host.Task(), tmp_path / "run.ckpt"
    host.trainer(tmp_path, host.Plugin(), max_epochs=2).fit(whole, loader())
    half, running = host.Task(), host.trainer(tmp_path, first())
    running.fit(half, loader())
    running.save_checkpoint(file)
    assert checkpoint.load(file)["cnmix"]["models"][0]["modules"].keys() == {"conv", "fc"}
    expected = evaluate(half)
    with torch.no_grad():
        assert torch.equal(torch.cat([inference.prepare(host.Task(), file)(x) for x, _ in loader()]), expected)

    caplog.set_level(logging.INFO, logger="cnmix")
    resumed = host.Task(seed=8)
    host.trainer(tmp_path, second(), max_epochs=2).fit(resumed, loader(), ckpt_path=file)
    assert same(whole, resumed)
    assert operands(whole) == operands(resumed)
    assert f"{second.__name__} takes that of {first.__name__}" in caplog.text


def test_several_unknown_states_are_not_guessed_among(host, tmp_path, caplog):
    class Mine(host.Plugin):
        pass

    class WithStateOfItsOwn(host.Task):
        def on_save_checkpoint(self, saved):
            saved["teacher"] = {"version": 2, "models": [], "loss_scalers": []}

    running = host.trainer(tmp_path, Mine())
    running.fit(WithStateOfItsOwn(), loader())
    running.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match="lacks cnmix"):
        checkpoint.load(tmp_path / "run.ckpt")
    fresh = host.Task()
    host.trainer(tmp_path, Mine()).test(fresh, loader(), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    assert steps_seen(fresh) == {BATCHES}
    assert said(caplog) == []
    host.trainer(tmp_path, host.Plugin()).test(fresh, loader(), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    assert "without a cnmix state" in caplog.text


@pytest.mark.parametrize("wrong", ["modules", "width", "loss scale"])
def test_a_state_that_does_not_fit_changes_nothing(host, net, batch, wrong):
    def start(*given, **settings):
        plugin = host.FabricPlugin(loss_scale="dynamic", max_bitwidth=8, **settings)
        fabric = host.start(plugin)
        for model in given:
            wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.05))
            fabric.backward(wrapped(batch()[0]).square().mean())
            optimizer.step()
        return plugin

    trained = [net(), net(1)]
    saved = start(*trained).state_dict()
    second = saved["models"][1]["modules"]
    if wrong == "modules":
        second["other"] = second.pop("fc2")
    elif wrong == "width":
        second["fc2"]["operands"]["input"]["bits"] = 16
    else:
        saved["loss_scalers"] = [[{"dynamic": True, "scale": "much"}]]
    models = [net(2), net(3)]
    plugin = start(*models)
    before = plugin.state_dict()
    with pytest.raises(ValueError, match=r"fc2|over max_bitwidth 8|loss scale"):
        plugin.load_state_dict(saved)
    assert plugin.state_dict() == before

    if wrong != "loss scale":
        waiting = host.FabricPlugin(loss_scale="dynamic", max_bitwidth=8)
        fabric = host.start(waiting)
        waiting.load_state_dict({**saved, "models": saved["models"][1:]})
        late = net()
        for _ in range(2):  # a second attempt is no way around
            with pytest.raises(ValueError, match=r"fc2|over max_bitwidth 8"):
                fabric.setup_module(late)
