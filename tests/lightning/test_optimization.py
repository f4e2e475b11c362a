"""Optimization under the Trainer, with and without a loss scale."""

import pytest
import torch
import torch.nn.functional as F
from hosts import BATCHES, loader, operands, same
from torch import nn

from cnmix.nn import quantized_modules


def scale_of(plugin):
    return plugin.state_dict()["loss_scalers"][0][0]["scale"]


def watched(host, **options):
    """A task that keeps the gradients' norm before each step, and overflows at the batches it is told."""

    class Watched(host.Task):
        def __init__(self, overflow=(), **kwargs):
            super().__init__(**kwargs)
            self.overflow, self.norms, self.flowing, self.moved = overflow, [], [], []

        def training_step(self, batch, batch_idx):
            self.moved.append(self.fc.weight.detach().clone())
            return super().training_step(batch, batch_idx)

        def loss(self, batch):
            loss = super().loss(batch)
            return loss * float("inf") if len(self.moved) - 1 in self.overflow else loss

        def on_before_backward(self, loss):
            loss.register_hook(lambda gradient: self.flowing.append(gradient.item()))

        def on_before_optimizer_step(self, optimizer):
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            self.norms.append(nn.utils.get_total_norm(gradients).item())

    return Watched(**options)


@pytest.mark.parametrize(
    ("settings", "manual"),
    [
        ({}, True),
        ({}, False),
        ({"gradient_clip_val": 0.01}, False),
        ({"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"}, False),
        ({"accumulate_grad_batches": 2}, False),
    ],
)
@pytest.mark.parametrize("scale", [128, "dynamic"])
def test_scaled_steps_equal_plain_ones(host, tmp_path, settings, scale, manual):
    plain, scaled = watched(host, manual=manual), watched(host, manual=manual)
    for task, loss_scale in ((plain, None), (scaled, scale)):
        host.trainer(tmp_path, host.Plugin(loss_scale=loss_scale), **settings).fit(task, loader())
    assert same(plain, scaled)
    assert scaled.norms == plain.norms
    assert set(scaled.flowing) == {2.0**16 if scale == "dynamic" else 128.0}
    assert set(plain.flowing) == {1.0}


@pytest.mark.parametrize("manual", [False, True])
def test_overflow_skips_its_step_only(host, tmp_path, caplog, manual):
    task, plugin = watched(host, overflow=[0, 2], manual=manual), host.Plugin(loss_scale="dynamic")
    host.trainer(tmp_path, plugin).fit(task, loader())
    steps = [torch.equal(a, b) for a, b in zip(task.moved, [*task.moved[1:], task.fc.weight], strict=True)]
    assert steps == [True, False, True, False, False, False]
    assert scale_of(plugin) == 2.0**14
    assert task.bn.num_batches_tracked == BATCHES
    assert caplog.text.count("gradient overflow: step skipped") == 2


def test_overflow_of_a_micro_batch_skips_the_accumulated_step(host, tmp_path):
    task, plugin = watched(host, overflow=[2]), host.Plugin(loss_scale="dynamic")
    host.trainer(tmp_path, plugin, accumulate_grad_batches=2, gradient_clip_val=0.1).fit(task, loader())
    assert not torch.equal(task.moved[1], task.moved[2])
    assert torch.equal(task.moved[3], task.moved[4])
    assert not torch.equal(task.moved[5], task.fc.weight)


def test_scheduler_around_a_skipped_step(host, tmp_path):
    class Scheduled(host.Task):
        def loss(self, batch):
            return super().loss(batch) * (float("inf") if self.global_step == 0 else 1.0)

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    fitting = host.trainer(tmp_path, host.Plugin(loss_scale="dynamic"))
    fitting.fit(Scheduled(), loader())
    assert fitting.optimizers[0].param_groups[0]["lr"] == 0.1 * 0.5**BATCHES


@pytest.mark.parametrize("level", ["O2", "O3"])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_half_activations_with_the_loss_outside_of_forward(host, tmp_path, level, dtype):
    class Outside(host.Task):
        def loss(self, batch):
            scores = self.fc(F.relu(self.bn(self.conv(batch[0]))).flatten(1))
            assert scores.dtype == torch.float32
            return F.cross_entropy(scores, batch[1])

    task, plugin = Outside(), host.Plugin(level, activation_dtype=dtype)
    host.trainer(tmp_path, plugin).fit(task, loader())
    half = torch.float16 if dtype else torch.bfloat16
    assert {module.quantizers.output_dtype for _, module in quantized_modules(task)} == {half}
    assert [bool(each) for each in plugin.state_dict()["loss_scalers"]] == [True] * (dtype == "float16")


@pytest.mark.parametrize("scale", [None, "dynamic"])
def test_lbfgs(host, tmp_path, scale):
    class Careful(host.Task):
        def loss(self, batch):
            self.losses = [*getattr(self, "losses", []), super().loss(batch)]
            overflow = scale and len(self.losses) == 2
            return self.losses[-1] * float("inf") if overflow else self.losses[-1]

        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    task, plugin = Careful(), host.Plugin(loss_scale=scale, max_bitwidth=16)
    before = task.fc.weight.detach().clone()
    host.trainer(tmp_path, plugin).fit(task, loader())
    assert len(task.losses) > 2 * BATCHES
    assert task.fc.weight.isfinite().all()
    assert not torch.equal(task.fc.weight, before)
    if scale:
        assert scale_of(plugin) == 2.0**15


def gan(host, toggled):
    class Gan(host.pl.LightningModule):
        """Both losses leave gradients in both parts unless the optimizers are toggled."""

        def __init__(self, overflow=None):
            super().__init__()
            torch.manual_seed(0)
            self.automatic_optimization = False
            self.generator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 36))
            self.judge = nn.Sequential(nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 1))
            self.overflow = overflow

        def step(self, optimizer, loss, name):
            if toggled:
                self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            # An infinity in one of the judge's own gradients alone.
            factor = float("inf") if self.overflow == (name, self.trainer.global_step // 2) else 1.0
            self.manual_backward(loss() * factor)
            optimizer.step()
            if toggled:
                self.untoggle_optimizer(optimizer)

        def training_step(self, batch, batch_idx):
            makes, judges = self.optimizers()
            real, noise = batch[0].flatten(1), torch.randn(len(batch[0]), 8)
            self.step(makes, lambda: F.softplus(-self.judge(self.generator(noise))).mean(), "generator")
            fake = self.generator(noise).detach()
            self.step(judges, lambda: (F.softplus(-self.judge(real)) + F.softplus(self.judge(fake))).mean(), "judge")

        def configure_optimizers(self):
            return [torch.optim.Adam(part.parameters(), lr=0.01) for part in (self.generator, self.judge)]

    return Gan


@pytest.mark.parametrize("toggled", [False, True])
def test_several_optimizers(host, tmp_path, toggled):
    Gan = gan(host, toggled)
    plain, scaled = Gan(), Gan()
    for task, scale in ((plain, None), (scaled, "dynamic")):
        torch.manual_seed(1)
        host.trainer(tmp_path, host.Plugin(loss_scale=scale)).fit(task, loader())
    assert same(plain, scaled)
    assert {len(operand) for operand in operands(plain).values()} == {3}


@pytest.mark.parametrize("toggled", [False, True])
@pytest.mark.parametrize("part", ["generator", "judge"])
def test_overflow_of_one_of_several_optimizers(host, tmp_path, toggled, part):
    task, plugin = gan(host, toggled)(overflow=(part, BATCHES - 1)), host.Plugin(loss_scale="dynamic")
    torch.manual_seed(1)
    fitting = host.trainer(tmp_path, plugin)
    fitting.fit(task, loader())
    taken = {
        name: {int(state["step"]) for state in optimizer.state.values()}
        for name, optimizer in zip(("generator", "judge"), fitting.optimizers, strict=True)
    }
    assert taken == {"generator": {BATCHES}, "judge": {BATCHES}} | {part: {BATCHES - 1}}
    assert scale_of(plugin) == 2.0**15


def test_scale_is_resumed_bit_for_bit(host, tmp_path):
    arguments = {"opt_level": "O2", "activation_dtype": "float16"}
    whole, plugin = watched(host, overflow=[1]), host.Plugin(**arguments)
    host.trainer(tmp_path, plugin, max_epochs=4).fit(whole, loader())
    first = host.trainer(tmp_path, host.Plugin(**arguments), max_epochs=2)
    first.fit(watched(host, overflow=[1]), loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["CnmixPlugin"]
    assert saved["loss_scalers"][0][0]["scale"] == 2.0**15
    resumed, again = watched(host, seed=8), host.Plugin(**arguments)
    host.trainer(tmp_path, again, max_epochs=4).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert same(whole, resumed)
    assert again.state_dict() == plugin.state_dict()
    assert again.state_dict()["loss_scalers"][0][0]["steps_without_overflow"] == 4 * BATCHES - 2


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_training_step_that_returns_nothing(host, tmp_path):
    class Idle(host.Task):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    tasks = [Idle(), Idle()]
    for task, scale in zip(tasks, (None, "dynamic"), strict=True):
        host.trainer(tmp_path, host.Plugin(loss_scale=scale)).fit(task, loader())
    assert same(*tasks)
