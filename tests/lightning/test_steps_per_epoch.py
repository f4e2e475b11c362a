import pytest
from hosts import BATCH, BATCHES, Stream, loader, operands, same
from torch.utils.data import DataLoader


@pytest.mark.parametrize(("settings", "steps"), [({}, BATCHES), ({"limit_train_batches": 4}, 4)])
def test_steps_per_epoch_come_from_the_trainer(host, tmp_path, settings, steps):
    task = host.Task()
    host.trainer(tmp_path, host.Plugin(), **settings).fit(task, loader())
    assert task.seen == [{steps}] * steps


def test_explicit_steps_per_epoch_are_kept(host, tmp_path):
    task = host.Task()
    host.trainer(tmp_path, host.Plugin(steps_per_epoch=123)).fit(task, loader())
    assert task.seen == [{123}] * BATCHES


def test_steps_per_epoch_of_the_first_step_decide_its_interval(host, tmp_path):
    task = host.Task()
    host.trainer(tmp_path, host.Plugin(settings={"quantify_rate": 0.0}), max_epochs=3).fit(task, loader())
    intervals = [operand["interval"] for module in operands(task).values() for operand in module.values()]
    assert max(intervals) <= BATCHES


def test_one_plugin_tells_each_model_the_steps_in_its_epoch(host, tmp_path):
    plugin, tasks = host.Plugin(), [host.Task(), host.Task(seed=1)]
    for task in tasks:
        host.trainer(tmp_path, [plugin]).fit(task, loader())
        assert task.seen[0] == {BATCHES}


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({}, 10_000),
        ({"max_steps": 9}, 9),
        ({"max_steps": 9, "accumulate_grad_batches": 2}, 18),
        ({"limit_train_batches": 4}, 4),
    ],
)
def test_data_without_a_length(host, tmp_path, settings, first):
    task, counted = host.Task(), settings.get("limit_train_batches", BATCHES)
    settings = {"max_epochs": 3, **settings}
    host.trainer(tmp_path, host.Plugin(), **settings).fit(task, DataLoader(Stream(), batch_size=BATCH))
    assert task.seen[:counted] == [{first}] * counted
    assert len(task.seen) > counted
    assert task.seen[counted:] == [{counted}] * (len(task.seen) - counted)


def test_data_without_a_length_resumed(host, tmp_path):
    def fit(task, epochs, **options):
        running = host.trainer(tmp_path, host.Plugin(), max_epochs=epochs)
        running.fit(task, DataLoader(Stream(), batch_size=BATCH), **options)
        return running

    whole = host.Task()
    fit(whole, 4)
    fit(host.Task(), 2).save_checkpoint(tmp_path / "half.ckpt")
    resumed = host.Task(seed=8)
    fit(resumed, 4, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.seen == [{BATCHES}] * 2 * BATCHES
    assert same(whole, resumed)
    assert operands(whole) == operands(resumed)


def test_data_without_a_length_resumed_within_an_epoch(host, tmp_path):
    class Saving(host.pl.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            if trainer.global_step == BATCHES + 2:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    for task, options in ((host.Task(), {}), (host.Task(), {"ckpt_path": tmp_path / "within.ckpt"})):
        running = host.trainer(tmp_path, host.Plugin(), max_epochs=3, callbacks=[Saving()])
        running.fit(task, DataLoader(Stream(), batch_size=BATCH), **options)
    assert task.seen[0] == {BATCHES}
