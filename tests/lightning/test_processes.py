"""Both packages train in processes that they fork or spawn: converted modules inside DDP, one state on all ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys
import torch
from hosts import Host, loader, operands
from torch.nn.parallel import DistributedDataParallel
import cnmix

strategy, folder, *packages = sys.argv[1:]

def fit(host):
    class Callback(host.pl.Callback):
        def on_train_end(self, trainer, task):
            assert isinstance(trainer.strategy.model, DistributedDataParallel)
            assert [type(module).__name__ for module in (task.conv, task.fc)] == ["QuantizedConv2d", "QuantizedLinear"]
            torch.save((operands(task), task.state_dict()), f"{folder}/{host.name}-{trainer.global_rank}.pt")

    plugin = host.Plugin(loss_scale=256.0)
    running = host.trainer(folder, [plugin], strategy=strategy, devices=2, callbacks=[Callback()])
    running.fit(host.Task(), loader())

if __name__ == "__main__":
    torch.set_num_threads(1)
    for package in packages:
        fit(Host(package))
"""


# One after the other in one process, where Lightning forks: importing it takes seconds.
@pytest.mark.parametrize(
    ("strategy", "packages"), [("ddp_fork", ["lightning", "pytorch_lightning"]), ("ddp", ["pytorch_lightning"])]
)
def test_ranks_end_with_one_state(tmp_path, strategy, packages):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here), *sys.path[:1]])}
    command = [sys.executable, "-W", "ignore", str(script), strategy, str(tmp_path), *packages]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for package in packages:
        (first, weights), (second, others) = (torch.load(tmp_path / f"{package}-{rank}.pt") for rank in (0, 1))
        assert first == second
        assert {operand["step"] for module in first.values() for operand in module.values()} == {3}
        assert all(torch.equal(weights[name], others[name]) for name in weights if "running" not in name)
