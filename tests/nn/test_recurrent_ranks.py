"""Recurrent layers in several processes choose one format together, as other modules do."""

import pytest
import torch
from test_ranks import same
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import cnmix
from cnmix.inference import freeze
from cnmix.registry import registry


class Recurrent(torch.nn.Module):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls
        self.lstm = torch.nn.LSTM(6, 5, 2, bidirectional=True, proj_size=3)
        self.cell = torch.nn.GRUCell(6, 4)
        self.head = torch.nn.Linear(4, 2)

    def forward(self, x):
        h = None
        for step in self.lstm(x)[0][-self.calls :]:
            h = self.cell(step, h)
        return self.head(h)


def recurrent(rank, wrap, settings, seeds, calls=1):
    """Trains an LSTM, each product of which counts one step for a sequence, and a cell, which each call counts one."""
    torch.set_num_threads(1)
    registry.models.clear()
    torch.manual_seed(0)
    model = Recurrent(calls)
    cnmix.initialize(model, None, **settings)
    wrapped = DistributedDataParallel(model) if wrap == "DistributedDataParallel" else model
    if wrap == "fully_shard":
        fully_shard(model.lstm)
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for each in seeds:
        optimizer.zero_grad()
        x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(each[rank]))
        wrapped(x).square().mean().backward()
        optimizer.step()
    if wrap == "fully_shard":
        with pytest.raises(ValueError, match=r"'lstm\.\.l0\.input' is shared out among processes"):
            freeze(model)
    weights = model.state_dict()
    return cnmix.state_dict(model), {
        name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in weights.items()
    }


@pytest.mark.parametrize(
    "settings", [{}, {"mode": "fixed_interval", "interval": 2, "threshold": 1e-3}, {"opt_level": "O2"}]
)
@pytest.mark.parametrize("wrap", ["DistributedDataParallel", "fully_shard"])
def test_recurrent_layers_choose_together(processes, wrap, settings):
    equal = [(seed, seed) for seed in range(5)]
    found = processes.run(recurrent, wrap, settings, equal)
    assert same(found[0], found[1])
    assert same(found[0], recurrent(0, None, settings, equal))
    assert same(*processes.run(recurrent, wrap, settings, [(seed, seed + 50) for seed in range(5)], 3))
