import copy
import pickle

import pytest
import torch
from hosts import BATCHES, loader, operands, same, steps_seen
from torch import nn

from cnmix import inference
from cnmix.nn import QuantizedLinear, quantized_modules


@pytest.mark.parametrize("given", ["one", "list"])
def test_fit(host, tmp_path, given):
    task, plugin = host.Task(), host.Plugin(opt_level="O1")
    before = task.fc.weight.detach().clone()
    fitting = host.trainer(tmp_path, plugin if given == "one" else [plugin])
    fitting.fit(task, loader())
    assert fitting.precision_plugin is plugin
    assert fitting.precision == "32-true"
    assert [fqn for fqn, _ in quantized_modules(task)] == ["conv", "fc"]
    assert not torch.equal(before, task.fc.weight)
    assert steps_seen(task) == {BATCHES}


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


def test_checkpoint(host, tmp_path):
    task = host.Task()
    fitted = host.trainer(tmp_path, host.Plugin())
    fitted.fit(task, loader())
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(saved["CnmixPlugin"]["models"][0]["modules"]) == {"conv", "fc"}
    plain = host.Task(seed=4)
    plain.load_state_dict(saved["state_dict"], strict=True)
    assert type(plain.fc) is nn.Linear
    assert same(plain, task)


def test_resume_is_bit_exact(host, tmp_path):
    whole = host.Task()
    host.trainer(tmp_path, host.Plugin(), max_epochs=4).fit(whole, loader())
    first = host.trainer(tmp_path, host.Plugin(), max_epochs=2)
    first.fit(host.Task(), loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = host.Task(seed=8)
    host.trainer(tmp_path, host.Plugin(), max_epochs=4).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert same(whole, resumed)
    assert operands(whole) == operands(resumed)
    assert len({operand["bits"] for module in operands(whole).values() for operand in module.values()}) > 1


def test_resume_without_the_plugin(host, tmp_path):
    first = host.trainer(tmp_path, host.Plugin())
    first.fit(host.Task(), loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    plain = host.Task(seed=8)
    host.trainer(tmp_path, None, max_epochs=2).fit(plain, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert type(plain.fc) is nn.Linear


def test_plugin_resumes_from_a_plain_checkpoint(host, tmp_path):
    first = host.trainer(tmp_path, None)
    first.fit(host.Task(), loader())
    first.save_checkpoint(tmp_path / "plain.ckpt")
    task = host.Task(seed=8)
    host.trainer(tmp_path, host.Plugin(), max_epochs=2).fit(task, loader(), ckpt_path=tmp_path / "plain.ckpt")
    assert steps_seen(task) == {BATCHES}


def test_validate_and_test_after_fit_change_nothing(host, tmp_path):
    task = host.Task()
    running = host.trainer(tmp_path, host.Plugin())
    running.fit(task, loader(), loader())
    before, weights = copy.deepcopy(operands(task)), copy.deepcopy(task)
    running.validate(task, loader(), verbose=False)
    running.test(task, loader(), verbose=False)
    running.save_checkpoint(tmp_path / "a.ckpt")
    running.test(task, loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert operands(task) == before
    assert same(task, weights)
    running.fit_loop.max_epochs = 2
    running.fit(task, loader(), loader())
    assert steps_seen(task) == {2 * BATCHES}


def test_sanity_validation_and_summary_move_no_statistics(host, tmp_path):
    plain, looked_at = host.Task(), host.Task()
    host.trainer(tmp_path, host.Plugin()).fit(plain, loader())
    settings = {"num_sanity_val_steps": 2, "enable_model_summary": True}
    host.trainer(tmp_path, host.Plugin(), **settings).fit(looked_at, loader(), loader())
    assert operands(plain) == operands(looked_at)
    assert same(plain, looked_at)


def test_accumulated_batches(host, tmp_path):
    task = host.Task()
    running = host.trainer(tmp_path, host.Plugin(), accumulate_grad_batches=2)
    running.fit(task, loader())
    assert running.global_step == BATCHES // 2
    assert steps_seen(task) == {BATCHES}


def test_gradient_clipping(host, tmp_path):
    norms = []

    class Clipped(host.Task):
        def on_before_zero_grad(self, optimizer):
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            if gradients:
                norms.append(nn.utils.get_total_norm(gradients).item())

    host.trainer(tmp_path, host.Plugin(), gradient_clip_val=0.01).fit(Clipped(), loader())
    assert norms
    assert max(norms) < 0.0101


def test_manual_optimisation_equals_automatic(host, tmp_path):
    manual, automatic = host.Task(manual=True), host.Task()
    for task in (manual, automatic):
        host.trainer(tmp_path, host.Plugin()).fit(task, loader())
    assert same(manual, automatic)
    assert operands(manual) == operands(automatic)


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


def test_excluded_and_unknown_modules(host, tmp_path):
    task = host.Task()
    host.trainer(tmp_path, host.Plugin(exclude=["conv"])).fit(task, loader())
    assert [fqn for fqn, _ in quantized_modules(task)] == ["fc"]
    with pytest.raises(ValueError, match="no module is called 'cnov': did you mean 'conv'"):
        host.trainer(tmp_path, host.Plugin(exclude=["cnov"])).fit(host.Task(), loader())


def test_plugin_is_picklable(host, tmp_path):
    plugin = host.Plugin(bitwidth=16, exclude=["conv"], settings={"gamma": 1.0})
    assert bool(plugin)
    again = pickle.loads(pickle.dumps(plugin))
    task = host.Task()
    host.trainer(tmp_path, again).fit(task, loader())
    assert isinstance(task.fc, QuantizedLinear)
    assert task.fc.quantizers.config.gamma == 1.0
    pickle.dumps(again)


def test_checkpoint_goes_straight_to_integer_inference(host, tmp_path):
    task, fitted = host.Task(), host.trainer(tmp_path, [host.Plugin()])
    fitted.fit(task, loader())
    fitted.save_checkpoint(tmp_path / "run.ckpt")
    model = inference.prepare(host.Task(seed=1), tmp_path / "run.ckpt")
    x = torch.randn(3, 1, 6, 6)
    with torch.no_grad():
        assert torch.equal(model(x), task.eval()(x))


def test_one_plugin_tells_each_model_the_steps_in_its_epoch(host, tmp_path):
    plugin, tasks = host.Plugin(), [host.Task(), host.Task(seed=1)]
    for task in tasks:
        host.trainer(tmp_path, [plugin]).fit(task, loader())
        assert task.seen[0] == {BATCHES}
