"""What is counted of a card's memory."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from cnmix.torch_mlu.card import library


def allocated(card: int = 0) -> int:
    return library().memory(card).allocated


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    gc.collect()
    before = allocated(0), allocated(1)
    yield
    gc.collect()
    assert (allocated(0), allocated(1)) == before


def test_tensors_are_counted_and_their_views_are_not() -> None:
    before = allocated()
    x = torch.zeros(1000, device="mlu")
    assert allocated() - before == 4000
    kept = [x.view(10, 100), x[1:], x.t(), x.detach(), x.add_(1), x.unfold(0, 3, 1), torch.ops.cnmix_card.host(x)]
    torch.mul(x, 2, out=x)
    x.relu_()
    assert allocated() - before == 4000
    y = x + 1
    z = torch.zeros(10, dtype=torch.float64, device="mlu:1")
    assert allocated() - before == 8000
    assert allocated(1) >= 80
    del x, y, z
    assert allocated() - before == 4000  # a view keeps it
    del kept
    assert allocated() == before


def test_the_peak() -> None:
    library().reset_peak(0)
    before = library().memory(0)
    torch.zeros(1000, device="mlu")
    torch.zeros(500, device="mlu")
    after = library().memory(0)
    assert after.peak - before.allocated == 4000
    assert after.allocations == before.allocations + 2
    library().reset_peak(0)
    assert library().memory(0).peak == after.allocated


def test_storages_that_grow_and_shrink() -> None:
    before = allocated()
    x = torch.zeros(10, device="mlu")
    x.resize_(1000)
    assert allocated() - before == 4000
    x.untyped_storage().resize_(0)
    assert allocated() == before
    x.untyped_storage().resize_(80)
    assert allocated() - before == 80
    y = torch.ones(1000, device="mlu")
    x.set_(y)
    assert allocated() - before == 4000
    out = torch.empty(0, device="mlu")
    torch.add(y, 1, out=out)
    assert allocated() - before == 8000


def test_ten_thousand_operators_leave_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(64, 3)
    )
    model.to("mlu")
    optimizer = torch.optim.Adam(model.parameters())
    x, y = torch.randn(2, 1, 6, 6, device="mlu"), torch.tensor([0, 2], device="mlu")
    counts = set()
    for step in range(100):  # of more than a hundred operators each
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if step >= 2:
            counts.add(allocated())
    assert len(counts) == 1


def test_threads() -> None:
    before = allocated()
    failed: list[Exception] = []

    def work() -> None:
        try:
            # PyTorch's own threads are as many as there were cards at the first backward pass of the process.
            torch.autograd.set_multithreading_enabled(False)
            for _ in range(100):
                x = torch.randn(10, 10, device="mlu", requires_grad=True)
                (x @ x).relu().sum().backward()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failed
    assert allocated() == before
