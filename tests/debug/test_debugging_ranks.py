"""A process that looks at the model by itself, while others train it with it."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from processes import Processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import cnmix
import cnmix.debug
from cnmix.nn import quantizer_sets


def train(rank: int, looks: bool) -> tuple[Any, list[float], list[str]]:
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("cnmix").addHandler(handler)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    cnmix.initialize(model, optimizer, "O1", max_bitwidth=8)
    wrapped = DistributedDataParallel(model)
    for step in range(4):
        x = torch.randn((4, 8), generator=torch.Generator().manual_seed(2 * step + rank))
        if looks and rank == 0 and step == 2:
            assert len(cnmix.debug.compare(wrapped, x).rows) == 2
            cnmix.debug.sensitivity(wrapped, x).suggest()
        optimizer.zero_grad()
        wrapped(x).sum().backward()
        optimizer.step()
    logging.getLogger("cnmix").removeHandler(handler)
    dist.barrier()
    states = {name: quantizers.state_dict() for name, quantizers in quantizer_sets(model)}
    return states, torch.cat([each.detach().flatten() for each in model.parameters()]).tolist(), logged


def test_one_of_several_processes_may_look(processes: Processes) -> None:
    plain, looked_at = (processes.run(train, looks) for looks in (False, True))
    assert [each[1] for each in plain] == [each[1] for each in looked_at]
    for before, after in zip(plain, looked_at, strict=True):
        assert before[0] == after[0]
        assert before[2] == after[2] == []
