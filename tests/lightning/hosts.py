"""Lightning's two packages behind one face, and a task to train under either."""

import importlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from cnmix.nn import quantized_modules

PACKAGES = ("lightning", "pytorch_lightning")
BATCHES, BATCH = 6, 4
# What a Trainer leaves out in a test.
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Host:
    """What a test needs of a package.

    Attributes:
        name: of the package.
        pl: its Trainer's part.
        fabric: its Fabric's part.
        Plugin: the Trainer's plugin.
        FabricPlugin: Fabric's.
        AtomicCheckpointIO: what saves whole files.
        Task: a small task to fit.
    """

    def __init__(self, name):
        self.name = name
        self.pl = importlib.import_module("lightning.pytorch" if name == "lightning" else name)
        self.fabric = importlib.import_module("lightning.fabric" if name == "lightning" else "lightning_fabric")
        ours = importlib.import_module(f"cnmix.{name}")
        self.Plugin, self.FabricPlugin = ours.CnmixPlugin, ours.FabricCnmixPlugin
        self.AtomicCheckpointIO = ours.AtomicCheckpointIO
        self.Task = task_class(self.pl)

    def trainer(self, folder, plugins, **settings):
        defaults = {**QUIET, "default_root_dir": folder}
        return self.pl.Trainer(plugins=plugins, **{**defaults, **settings})

    def start(self, plugin, **settings):
        return self.fabric.Fabric(accelerator="cpu", devices=1, plugins=[plugin], **settings)


def task_class(pl):
    class Task(pl.LightningModule):
        """Classifies; ``seen`` has the steps in an epoch that the modules knew at each step."""

        def __init__(self, seed=0, manual=False):
            super().__init__()
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(1, 4, 3)
            self.bn = nn.BatchNorm2d(4)
            self.fc = nn.Linear(64, 3)
            self.automatic_optimization = not manual
            self.example_input_array = torch.full((2, 1, 6, 6), 1000.0)
            self.seen = []

        def forward(self, x):
            return self.fc(F.relu(self.bn(self.conv(x))).flatten(1))

        def loss(self, batch):
            return F.cross_entropy(self(batch[0]), batch[1])

        def training_step(self, batch, batch_idx):
            self.seen.append({module.quantizers.config.steps_per_epoch for _, module in quantized_modules(self)})
            loss = self.loss(batch)
            if not self.automatic_optimization:
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()
            return loss

        def validation_step(self, batch, batch_idx):
            self(1000 * batch[0])

        def test_step(self, batch, batch_idx):
            self(batch[0])

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    return Task


def data(count=BATCH * BATCHES):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 1, 6, 6, generator=generator)
    x[::7] *= 30
    return TensorDataset(x, torch.randint(0, 3, (count,), generator=generator))


def loader(count=BATCH * BATCHES):
    return DataLoader(data(count), batch_size=BATCH)


class Stream(IterableDataset):
    """The same samples without a length."""

    def __iter__(self):
        return iter(data())


def operands(task):
    return {fqn: module.quantizers.state_dict()["operands"] for fqn, module in quantized_modules(task)}


def steps_seen(task):
    return {operand["step"] for module in operands(task).values() for operand in module.values()}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
