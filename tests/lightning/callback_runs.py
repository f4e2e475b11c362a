"""Small runs for the tests of callbacks, over the package that a test is given."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import cnmix
from cnmix.nn import quantized_modules

BATCHES, BATCH = 6, 4


def make_task(package, optimizers=1, reentrant=None, fails_at=None, converted=True, skips=()):
    class Task(package.pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(1, 4, 3)
            self.fc = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
            self.extra = nn.Linear(3, 3)
            self.automatic_optimization = optimizers == 1

        def forward(self, x):
            return self.fc(F.relu(self.conv(x)).flatten(1))

        def training_step(self, batch, batch_idx):
            if batch_idx == fails_at:
                raise RuntimeError("out of luck")
            x, y = batch
            scores = self(x) if reentrant is None else checkpoint(self, x.requires_grad_(), use_reentrant=reentrant)
            if batch_idx not in skips:
                scores = self.extra(scores)
            loss = F.cross_entropy(scores, y)
            if optimizers > 1:
                self.manual_backward(loss)
                for optimizer in self.optimizers():
                    optimizer.step()
                    optimizer.zero_grad()
            return loss

        def validation_step(self, batch, batch_idx):
            self(batch[0])

        def configure_optimizers(self):
            parts = [self.conv, self.fc, self.extra]
            every = [torch.optim.SGD(part.parameters(), lr=0.05) for part in parts[: optimizers - 1]]
            rest = [p for part in parts[optimizers - 1 :] for p in part.parameters()]
            return [*every, torch.optim.SGD(rest, lr=0.05)]

    task = Task()
    if converted:
        cnmix.initialize(task, opt_level="O1")
    return task


def loader(count=BATCH * BATCHES):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 1, 6, 6, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, 3, (count,), generator=generator)), batch_size=BATCH)


def make_trainer(package, tmp_path, *watching, **settings):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": any(isinstance(each, package.ProgressBar) for each in watching),
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
    }
    return package.pl.Trainer(callbacks=list(watching), **{**defaults, **settings})


class Kept:
    """A logger's part that matters here."""

    def __init__(self, package):
        class Memory(package.loggers.Logger):
            name, version = "memory", 0

            def __init__(self):
                super().__init__()
                self.rows = []

            def log_metrics(self, metrics, step=None):
                self.rows.append((step, dict(metrics)))

            def log_hyperparams(self, *args, **kwargs):
                pass

        self.logger = Memory()

    @property
    def rows(self):
        """(step, what CnmixMonitor logged)."""
        return [(step, row) for step, row in self.logger.rows if any(key.startswith("cnmix/") for key in row)]

    @property
    def steps(self):
        return [step for step, _ in self.rows]


def looking(task):
    return [q.name for _, module in quantized_modules(task) for _, q in module.quantizers if q.look_next]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
