import copy
import pickle
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cnmix import inference
from cnmix.lightning import CnmixPlugin
from cnmix.nn import QuantizedLinear, quantized_modules

BATCHES, BATCH = 6, 4


class Task(pl.LightningModule):
    def __init__(self, seed=0, manual=False):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(64, 3)
        self.automatic_optimization = not manual
        self.example_input_array = torch.full((2, 1, 6, 6), 1000.0)
        self.steps = []

    def forward(self, x):
        return self.fc(F.relu(self.bn(self.conv(x))).flatten(1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.steps.append({module.quantizers.config.steps_per_epoch for _, module in quantized_modules(self)})
        if not self.automatic_optimization:
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
        return loss

    def validation_step(self, batch, batch_idx):
        self(1000 * batch[0])

    def test_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


@pytest.fixture(autouse=True)
def _quiet():
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
        warnings.filterwarnings("ignore", message=".*have no `val_dataloader`.*")
        yield


def loader(count=BATCH * BATCHES):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 1, 6, 6, generator=generator)
    x[::7] *= 30
    return DataLoader(TensorDataset(x, torch.randint(0, 3, (count,), generator=generator)), batch_size=BATCH)


def trainer(tmp_path, plugins, **settings):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
    }
    return pl.Trainer(plugins=plugins, **{**defaults, **settings})


def operands(task):
    return {fqn: module.quantizers.state_dict()["operands"] for fqn, module in quantized_modules(task)}


def steps_seen(task):
    return {operand["step"] for module in operands(task).values() for operand in module.values()}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("given", ["one", "list"])
def test_fit(tmp_path, given):
    task, plugin = Task(), CnmixPlugin(opt_level="O1")
    before = task.fc.weight.detach().clone()
    fitting = trainer(tmp_path, plugin if given == "one" else [plugin])
    fitting.fit(task, loader())
    assert fitting.precision_plugin is plugin
    assert fitting.precision == "32-true"
    assert [fqn for fqn, _ in quantized_modules(task)] == ["conv", "fc"]
    assert not torch.equal(before, task.fc.weight)
    assert steps_seen(task) == {BATCHES}


@pytest.mark.parametrize(("settings", "steps"), [({}, BATCHES), ({"limit_train_batches": 4}, 4)])
def test_steps_per_epoch_come_from_the_trainer(tmp_path, settings, steps):
    task = Task()
    trainer(tmp_path, CnmixPlugin(), **settings).fit(task, loader())
    assert task.steps == [{steps}] * steps


def test_explicit_steps_per_epoch_are_kept(tmp_path):
    task = Task()
    trainer(tmp_path, CnmixPlugin(steps_per_epoch=123)).fit(task, loader())
    assert task.steps == [{123}] * BATCHES


def test_steps_per_epoch_of_the_first_step_decide_its_interval(tmp_path):
    task = Task()
    trainer(tmp_path, CnmixPlugin(settings={"quantify_rate": 0.0}), max_epochs=3).fit(task, loader())
    intervals = [operand["interval"] for module in operands(task).values() for operand in module.values()]
    assert max(intervals) <= BATCHES


def test_checkpoint(tmp_path):
    task = Task()
    fitted = trainer(tmp_path, CnmixPlugin())
    fitted.fit(task, loader())
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(saved["CnmixPlugin"]["models"][0]["modules"]) == {"conv", "fc"}
    plain = Task(seed=4)
    plain.load_state_dict(saved["state_dict"], strict=True)
    assert type(plain.fc) is nn.Linear
    assert same(plain, task)


def test_resume_is_bit_exact(tmp_path):
    whole = Task()
    trainer(tmp_path, CnmixPlugin(), max_epochs=4).fit(whole, loader())
    first = trainer(tmp_path, CnmixPlugin(), max_epochs=2)
    first.fit(Task(), loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Task(seed=8)
    trainer(tmp_path, CnmixPlugin(), max_epochs=4).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert same(whole, resumed)
    assert operands(whole) == operands(resumed)
    assert len({operand["bits"] for module in operands(whole).values() for operand in module.values()}) > 1


def test_resume_without_the_plugin(tmp_path):
    first = trainer(tmp_path, CnmixPlugin())
    first.fit(Task(), loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    plain = Task(seed=8)
    trainer(tmp_path, None, max_epochs=2).fit(plain, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert type(plain.fc) is nn.Linear


def test_plugin_resumes_from_a_plain_checkpoint(tmp_path):
    first = trainer(tmp_path, None)
    first.fit(Task(), loader())
    first.save_checkpoint(tmp_path / "plain.ckpt")
    task = Task(seed=8)
    trainer(tmp_path, CnmixPlugin(), max_epochs=2).fit(task, loader(), ckpt_path=tmp_path / "plain.ckpt")
    assert steps_seen(task) == {BATCHES}


def test_validate_and_test_after_fit_change_nothing(tmp_path):
    task = Task()
    running = trainer(tmp_path, CnmixPlugin())
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


def test_sanity_validation_and_summary_move_no_statistics(tmp_path):
    plain, looked_at = Task(), Task()
    trainer(tmp_path, CnmixPlugin()).fit(plain, loader())
    settings = {"num_sanity_val_steps": 2, "enable_model_summary": True}
    trainer(tmp_path, CnmixPlugin(), **settings).fit(looked_at, loader(), loader())
    assert operands(plain) == operands(looked_at)
    assert same(plain, looked_at)


def test_accumulated_batches(tmp_path):
    task = Task()
    running = trainer(tmp_path, CnmixPlugin(), accumulate_grad_batches=2)
    running.fit(task, loader())
    assert running.global_step == BATCHES // 2
    assert steps_seen(task) == {BATCHES}


def test_gradient_clipping(tmp_path):
    norms = []

    class Clipped(Task):
        def on_before_zero_grad(self, optimizer):
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            if gradients:
                norms.append(nn.utils.get_total_norm(gradients).item())

    trainer(tmp_path, CnmixPlugin(), gradient_clip_val=0.01).fit(Clipped(), loader())
    assert norms
    assert max(norms) < 0.0101


def test_manual_optimisation_equals_automatic(tmp_path):
    manual, automatic = Task(manual=True), Task()
    for task in (manual, automatic):
        trainer(tmp_path, CnmixPlugin()).fit(task, loader())
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
def test_bad_arguments_at_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        CnmixPlugin(**arguments)


def test_excluded_and_unknown_modules(tmp_path):
    task = Task()
    trainer(tmp_path, CnmixPlugin(exclude=["conv"])).fit(task, loader())
    assert [fqn for fqn, _ in quantized_modules(task)] == ["fc"]
    with pytest.raises(ValueError, match="no module is called 'cnov': did you mean 'conv'"):
        trainer(tmp_path, CnmixPlugin(exclude=["cnov"])).fit(Task(), loader())


def test_plugin_is_picklable(tmp_path):
    plugin = CnmixPlugin(bitwidth=16, exclude=["conv"], settings={"gamma": 1.0})
    assert bool(plugin)
    again = pickle.loads(pickle.dumps(plugin))
    task = Task()
    trainer(tmp_path, again).fit(task, loader())
    assert isinstance(task.fc, QuantizedLinear)
    assert task.fc.quantizers.config.gamma == 1.0
    pickle.dumps(again)


def test_checkpoint_goes_straight_to_integer_inference(tmp_path):
    task, fitted = Task(), trainer(tmp_path, [CnmixPlugin()])
    fitted.fit(task, loader())
    fitted.save_checkpoint(tmp_path / "run.ckpt")
    model = inference.prepare(Task(seed=1), tmp_path / "run.ckpt")
    x = torch.randn(3, 1, 6, 6)
    with torch.no_grad():
        assert torch.equal(model(x), task.eval()(x))


def test_one_plugin_tells_each_model_the_steps_in_its_epoch(tmp_path):
    plugin, tasks = CnmixPlugin(), [Task(), Task(seed=1)]
    for task in tasks:
        trainer(tmp_path, [plugin]).fit(task, loader())
        assert task.steps[0] == {BATCHES}
