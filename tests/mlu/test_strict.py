"""What the strict mode refuses, and what it must not."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnmix.torch_mlu
from cnmix.torch_mlu.card import library


@pytest.fixture
def strict() -> None:
    cnmix.torch_mlu.install(strict=True)


def card(*shape: int) -> Tensor:
    return torch.randn(shape, device="mlu")


HOST = torch.ones(3)
MIXED: dict[str, tuple[Callable[[], Any], str]] = {
    "add": (lambda: card(3) + HOST, "aten::add got its argument other from the host"),
    "in place on the card": (lambda: card(3).mul_(HOST), "aten::mul_ got its argument other from the host"),
    "in place on the host": (lambda: torch.ones(3).add_(card(3)), "aten::add_ got its argument self from the host"),
    "a number of the host that is written": (lambda: torch.tensor(0.0).add_(card()), "argument self from the host"),
    "out of the host": (lambda: torch.add(card(3), 1, out=torch.empty(3)), "argument out from the host"),
    "cat": (lambda: torch.cat([card(3), HOST]), "aten::cat got its argument tensors from the host"),
    "stack of numbers": (
        lambda: torch.stack([card(), torch.tensor(1.0)]),
        "aten::.* got its argument tensors from the host",
    ),
    "mm": (lambda: card(3, 3) @ HOST, "got its argument .* from the host"),
    "a model on the host": (lambda: nn.Linear(3, 2)(card(2, 3)), "got its argument .* from the host"),
    "an input on the host": (lambda: nn.Linear(3, 2).to("mlu")(torch.ones(2, 3)), "got its argument .* from the host"),
    "a weight on the host": (lambda: F.layer_norm(card(3), (3,), HOST), "got its argument weight from the host"),
    "a convolution": (lambda: F.conv1d(card(1, 1, 3), torch.ones(1, 1, 2)), "got its argument weight from the host"),
    "tokens": (
        lambda: F.embedding(torch.tensor([1]), card(5, 2)),
        "aten::.* got its argument index from the host",
    ),
    "labels": (lambda: F.cross_entropy(card(2, 3), torch.tensor([0, 1])), "got its argument target from the host"),
    "a mask": (lambda: card(3).masked_fill(HOST > 0, 0), "got its argument mask from the host"),
    "where": (lambda: torch.where(HOST > 0, card(3), 0.0), "got its argument condition from the host"),
    "gather": (lambda: card(3).gather(0, torch.tensor([1])), "got its argument index from the host"),
    "values of x[...] =": (
        lambda: card(3).index_put_((torch.tensor([1, 2]),), torch.ones(2)),
        "argument values from the host",
    ),
    "equal": (lambda: torch.equal(card(3), HOST), "aten::equal got its argument other from the host"),
    "foreach": (lambda: torch._foreach_add_([card(3)], [HOST]), "got its argument other from the host"),
    "a gradient": (lambda: card(3).requires_grad_().mul(2).backward(HOST), "expected device mlu:0 but got cpu"),
    "a generator": (
        lambda: torch.randn(3, device="mlu", generator=torch.Generator()),
        r"aten::normal_ on mlu:0 got a generator of the host: .* torch.Generator\('mlu:0'\)",
    ),
}


@pytest.mark.parametrize("misuse", MIXED)
def test_host_and_card_are_not_mixed(strict: None, misuse: str) -> None:
    call, message = MIXED[misuse]
    with pytest.raises(RuntimeError, match=message):
        call()


def test_the_refusal_says_what_to_do(strict: None) -> None:
    with pytest.raises(
        RuntimeError, match=r"others from mlu:1: a card refuses that; bring it there with .to\('mlu:1'\)"
    ):
        card(3).to("mlu:1") + HOST


def test_without_it_one_line_is_logged_and_the_result_is_right(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("torch_mlu")
    before = logger.propagate
    logger.propagate = True
    try:
        with caplog.at_level(logging.WARNING, logger="torch_mlu"):
            for _ in range(3):
                # An operator that no other test mixes: a line is logged once in a process.
                found = torch.hypot(torch.full((3,), 3.0, device="mlu"), torch.full((3,), 4.0))
    finally:
        logger.propagate = before
    assert found.tolist() == [5.0] * 3
    assert [each.getMessage() for each in caplog.records] == [
        "aten::hypot got its argument other from the host and others from mlu:0: a card refuses that; bring it there "
        "with .to('mlu:0')"
    ]


TWO_CARDS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "add": lambda x, y: x + y,
    "a number": lambda x, y: x + y[0],
    "in place": lambda x, y: x.add_(y),
    "cat": lambda x, y: torch.cat([x, y]),
    "mm": lambda x, y: x[None] @ y[:, None],
    "linear": lambda x, y: F.linear(x[None], y[None]),
    "indices": lambda x, y: x[y.long()],
}


@pytest.mark.parametrize("strictly", [True, False])
@pytest.mark.parametrize("misuse", TWO_CARDS)
def test_two_cards_are_never_mixed(misuse: str, strictly: bool) -> None:
    cnmix.torch_mlu.install(strict=strictly)
    with pytest.raises(RuntimeError, match=r"mlu:0.*mlu:1|mlu:1.*mlu:0"):
        TWO_CARDS[misuse](torch.ones(2, device="mlu:0"), torch.ones(2, device="mlu:1"))


@pytest.mark.parametrize("strictly", [True, False])
def test_memory_is_never_shared_between_host_and_card(strictly: bool) -> None:
    cnmix.torch_mlu.install(strict=strictly)
    for call in (
        lambda: card(3).set_(HOST),
        lambda: card(3).set_(HOST.untyped_storage()),
        lambda: torch.empty(0).set_(card(3)),
    ):
        with pytest.raises(RuntimeError, match="aten::set_ cannot share memory between the host and mlu:0"):
            call()
    with pytest.raises(TypeError, match="can't convert mlu:0 device type tensor to numpy"):
        card(3).numpy()


@pytest.mark.parametrize("strictly", [True, False])
def test_what_only_the_host_has_never_takes_a_card(strictly: bool) -> None:
    cnmix.torch_mlu.install(strict=strictly)
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator but found 'mlu'"):
        torch.randn(3, generator=torch.Generator("mlu"))
    with pytest.raises(TypeError, match="can't convert mlu:0 device type tensor to numpy"):
        np.asarray(card(3))


_DOUBLES = """
import torch, cnmix.torch_mlu
cnmix.torch_mlu.install(strict={strict})
print((torch.ones(3, dtype=torch.float64, device="mlu") * 2).dtype)
print((torch.ones(3, dtype=torch.complex128, device="mlu") * 2).dtype)
"""


@pytest.mark.parametrize("strictly", [True, False])
def test_types_without_arithmetic_are_logged_once(strictly: bool) -> None:
    command = [sys.executable, "-c", _DOUBLES.format(strict=strictly)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.split() == ["torch.float64", "torch.complex128"]
    assert found.stderr.count("a tensor of float64 is on a card, which has no such arithmetic") == strictly


@pytest.mark.parametrize("make", ["zeros", "empty", "randperm", "tril_indices", "linspace"])
def test_a_card_that_is_not_there(make: str) -> None:
    arguments = {"tril_indices": (2, 2), "linspace": (0, 1, 3)}.get(make, (3,))
    with pytest.raises(RuntimeError, match="there is no card mlu:2: this process has 2"):
        getattr(torch, make)(*arguments, device="mlu:2")


def test_what_was_not_written_shows(strict: None) -> None:
    assert torch.empty(3, device="mlu").isnan().all()
    assert torch.empty_like(card(2, 2)).isnan().all()
    assert card(3).new_empty(2, 2).isnan().all()
    assert torch.empty_strided((2, 2), (1, 2), dtype=torch.bfloat16, device="mlu").isnan().all()
    assert torch.empty(2, dtype=torch.int8, device="mlu").tolist() == [127, 127]


def test_more_than_the_memory_of_the_card(strict: None) -> None:
    before = library().memory(0)
    library().set(2, True, False, before.allocated + 4096)
    kept = torch.ones(1024, device="mlu")
    with pytest.raises(torch.OutOfMemoryError, match="mlu:0 is out of memory: tried to allocate 4096 bytes where "):
        torch.ones(1024, device="mlu")
    with pytest.raises(torch.OutOfMemoryError):
        kept + 1
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(0, device="mlu").resize_(4096)
    assert library().memory(0).allocated == before.allocated + 4096
    del kept
    assert torch.ones(1024, device="mlu").is_mlu


def test_without_it_more_than_the_memory_is_given(caplog: pytest.LogCaptureFixture) -> None:
    library().set(2, False, False, 1)
    assert (torch.ones(1024, device="mlu") + 1).sum() == 2048


def test_kinds_of_tensors_that_a_card_has_none_of() -> None:
    for call in (
        lambda: card(3).to_sparse(),
        lambda: torch.eye(3).to_sparse().to("mlu"),
        lambda: torch.quantize_per_tensor(card(3), 0.1, 0, torch.qint8),
        lambda: (
            nn.Embedding(5, 2, sparse=True).to("mlu")(torch.ones(2, dtype=torch.long, device="mlu")).sum().backward()
        ),
    ):
        with pytest.raises(RuntimeError, match=r"the emulated card has no(ne)?\b"):
            call()


# What a card takes.


def test_numbers_of_the_host(strict: None) -> None:
    x, number = card(3), torch.tensor(2.0)
    for found in (
        x + number,
        number * x,
        torch.where(x > 0, number, x),
        x.clamp(min=number),
        x.masked_fill(x > 0, number),
    ):
        assert found.is_mlu
    x[0] = number
    x.fill_(number)
    assert torch.lerp(x, x, number).is_mlu
    assert torch.addcmul(x, x, number).is_mlu


def test_indices_of_the_host(strict: None) -> None:
    x, i, mask = card(4, 5), torch.tensor([0, 2]), torch.tensor([True, False, True, False])
    assert x[i].equal(x[mask])
    assert x[[0, 2]].equal(x[i.to("mlu")])
    assert x[i, i].shape == (2,)
    x[i] = 1.0
    x[mask] += 2
    assert x[i].eq(3).all()


def test_copies(strict: None) -> None:
    x = torch.empty(3, device="mlu").copy_(HOST)
    y = torch.empty(3).copy_(x)
    z = torch.empty(3, dtype=torch.float64, device="mlu:1").copy_(x, non_blocking=True)
    assert y.tolist() == z.tolist() == [1.0] * 3
    x[1:] = torch.zeros(2)
    torch._foreach_copy_([x, z], [HOST * 2, HOST * 3])
    assert (x.sum(), z.sum()) == (6, 9)
    model = nn.BatchNorm1d(3).to("mlu")
    model.load_state_dict(nn.BatchNorm1d(3).state_dict())
    assert x.new_tensor([1, 2]).is_mlu


def test_lengths(strict: None) -> None:
    x, lengths = card(3, 5, 2).requires_grad_(), torch.tensor([5, 3, 1])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
    assert not packed.batch_sizes.is_mlu  # as on every device
    padded, found = nn.utils.rnn.pad_packed_sequence(nn.GRU(2, 4).to("mlu")(packed)[0])
    padded.sum().backward()
    assert found.tolist() == [5, 3, 1]
    assert x.grad is not None
    assert x.grad.is_mlu
    scores = card(10, 2, 5).log_softmax(2).requires_grad_()
    targets = torch.randint(1, 5, (2, 4), device="mlu")
    F.ctc_loss(scores, targets, torch.tensor([10, 8]), torch.tensor([4, 3])).backward()
    assert torch.tensor_split(card(4), torch.tensor([1, 2]))[0].is_mlu


FUSED = ("SGD", "Adam", "AdamW", "Adagrad")
OPTIMIZERS = [
    (name, how) for name in (*FUSED, "RMSprop", "NAdam") for how in ({}, {"foreach": True}, {"foreach": False})
]


@pytest.mark.parametrize(("name", "how"), [*OPTIMIZERS, *((name, {"fused": True}) for name in FUSED)])
def test_optimizers(strict: None, name: str, how: dict[str, bool]) -> None:
    torch.manual_seed(0)
    host = nn.Linear(3, 2)
    model = copy.deepcopy(host).to("mlu")
    pairs = [(m, getattr(torch.optim, name)(m.parameters(), lr=0.1, **how)) for m in (host, model)]
    for m, optimizer in pairs:
        for _ in range(3):
            optimizer.zero_grad()
            m(torch.ones(4, 3, device=m.weight.device)).square().sum().backward()
            nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            optimizer.step()
    torch.testing.assert_close(
        model.weight.cpu(), host.weight, rtol=1e-6, atol=1e-7
    )  # a list's steps may round otherwise


def test_modules_that_make_tensors_of_their_own(strict: None) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1).to("mlu")
    x, padding = card(2, 4, 8), torch.tensor([[False] * 4, [False, False, True, True]], device="mlu")
    model(x, src_key_padding_mask=padding).sum().backward()
    with torch.no_grad():
        assert model.eval()(x, src_key_padding_mask=padding).is_mlu
    norm = nn.BatchNorm2d(3).to("mlu")
    norm(card(2, 3, 4, 4)).sum().backward()
    assert norm.num_batches_tracked.is_mlu


def test_float64_is_logged_where_the_script_made_it(strict: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "torch_mlu"):
        repr(card(3))
        scaler = torch.amp.GradScaler("mlu")
        model = nn.Linear(2, 1).to("mlu")
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler.scale(model(card(3, 2)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert "float64" not in caplog.text
