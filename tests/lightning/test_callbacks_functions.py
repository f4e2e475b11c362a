"""The callbacks find products of functions, which come to be in the first training step."""

import pytest
import torch
import torch.nn.functional as F
from callback_runs import Kept, loader, make_trainer
from torch import nn

import cnmix
from cnmix.nn import quantizer_sets

NAMES = {"head..forward+1:matmul(weight)"}


def make_task(package, whole=False):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(36, 3) / 6)

        def forward(self, x):
            return x.flatten(1) @ self.weight

    class Task(package.pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.head = Head()
            self.last = nn.Linear(3, 3) if whole else nn.Identity()

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.last(self.head(batch[0])), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    task = Task()
    cnmix.initialize(task, bitwidth=16)
    return task


@pytest.mark.parametrize(("whole", "modules"), [(False, []), (True, []), (True, ["head"])])
def test_monitor(package, tmp_path, caplog, whole, modules):
    task, kept = make_task(package, whole), Kept(package)
    monitor = package.Monitor(every_n_steps=3, modules=modules)
    make_trainer(package, tmp_path, monitor, logger=kept.logger).fit(task, loader())
    assert kept.steps == [0, 3]
    expected = NAMES | ({"last"} if whole and not modules else set())
    for _, row in kept.rows:
        assert {key.split("/")[1] for key in row} == expected
    # The first step looks at no shares yet.
    (_, first), (_, later) = kept.rows
    assert first["cnmix/head..forward+1:matmul(weight)/input/bits"] == 16
    assert "cnmix/head..forward+1:matmul(weight)/input/saturation" in later
    assert not [q.name for _, quantizers in quantizer_sets(task) for _, q in quantizers if q.look_next]
    assert "nothing to log" not in caplog.text


def test_progress_bar_and_summary(package, tmp_path, console):
    console.width = 100
    shown = []

    class Bar(package.ProgressBar):
        def get_metrics(self, trainer, pl_module):
            shown.append(super().get_metrics(trainer, pl_module))
            return shown[-1]

    make_trainer(package, tmp_path, Bar(), package.Summary()).fit(make_task(package), loader())
    assert shown[-1]["width"] == "16.0 bit"
    assert "head..forward+1:matmul(weight)" in console.export_text()
