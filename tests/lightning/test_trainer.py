import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hosts import BATCHES, loader, operands, same, steps_seen
from torch import nn
from torch.utils.checkpoint import checkpoint

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


def test_never_fitted(host, tmp_path):
    running, plain = host.trainer(tmp_path, host.Plugin("O2")), host.Task().eval()
    task = host.Task()
    running.validate(task, loader(), verbose=False)
    running.test(task, loader(), verbose=False)
    answers = torch.cat(running.predict(task, loader()))
    assert isinstance(task.fc, QuantizedLinear)
    assert steps_seen(task) == {0}
    with torch.no_grad():
        expected = torch.cat([plain(batch[0]) for batch in loader()])
    assert answers.dtype == torch.float32
    assert torch.allclose(answers, expected, atol=0.1 * float(expected.abs().max()))


def test_another_plugin_for_the_same_model_is_refused(host, tmp_path):
    task = host.Task()
    host.trainer(tmp_path, host.Plugin()).fit(task, loader())
    host.trainer(tmp_path, host.Plugin()).test(task, loader(), verbose=False)
    with pytest.raises(ValueError, match="was initialized before, with opt_level 'O1'"):
        host.trainer(tmp_path, host.Plugin("O2")).test(task, loader(), verbose=False)


def test_activation_checkpointing_changes_nothing(host, tmp_path):
    class Checkpointed(host.Task):
        def forward(self, x):
            x = checkpoint(lambda x: F.relu(self.conv(x)), x, use_reentrant=False)
            return self.fc(x.flatten(1))

    class Whole(host.Task):
        def forward(self, x):
            return self.fc(F.relu(self.conv(x)).flatten(1))

    tasks = [Whole(), Checkpointed()]
    for task in tasks:
        host.trainer(tmp_path, host.Plugin(loss_scale="dynamic")).fit(task, loader())
    assert same(*tasks)
    assert operands(tasks[0]) == operands(tasks[1])


def test_compiled(host, tmp_path):
    tasks = [host.Task(), host.Task()]
    host.trainer(tmp_path, host.Plugin(), max_epochs=2).fit(tasks[0], loader())
    compiled = torch.compile(tasks[1], backend="aot_eager")
    host.trainer(tmp_path, host.Plugin(), max_epochs=2).fit(compiled, loader())
    assert all(
        torch.allclose(a, b, atol=1e-5)
        for a, b in zip(tasks[0].state_dict().values(), tasks[1].state_dict().values(), strict=True)
    )
    assert steps_seen(tasks[1]) == {2 * BATCHES}
    torch._dynamo.reset()


@pytest.mark.parametrize("place", ["configure_model", "training_step", "validation_step"])
def test_default_dtype_after_an_exception(host, tmp_path, place):
    def fail(self, *args):
        raise ZeroDivisionError

    task = type("Failing", (host.Task,), {place: fail})()
    with pytest.raises(ZeroDivisionError):
        host.trainer(tmp_path, host.Plugin("O2", activation_dtype="float16")).fit(task, loader(), loader())
    assert torch.get_default_dtype() == torch.float32


def test_summary_of_the_example_input(host, tmp_path, capsys):
    task = host.Task()
    settings = {"enable_model_summary": True, "max_epochs": 1, "limit_train_batches": 1}
    host.trainer(tmp_path, host.Plugin("O2"), **settings).fit(task, loader())
    summary = host.pl.utilities.model_summary.ModelSummary(task)
    assert summary.out_sizes[summary.layer_names.index("fc")] == [2, 3]
    assert steps_seen(task) == {1}
