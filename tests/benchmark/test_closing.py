"""After MLU_ADAPTIVE_STRATEGY_COUNT iterations no operand measures again."""

import copy
import gc
import logging
import pickle

import pytest
import torch
from small_net import Net
from torch import nn

import cnmix
from cnmix.nn import quantizer_sets

COUNT = 3


@pytest.fixture(autouse=True)
def count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLU_ADAPTIVE_STRATEGY_COUNT", str(COUNT))


def updates(model: nn.Module) -> dict[str, int]:
    """Returns the updates of every operand."""
    return {
        f"{name}.{operand}": quantizer.state.updates
        for name, quantizers in quantizer_sets(model)
        for operand, quantizer in quantizers
    }


def formats(model: nn.Module) -> list[tuple[int, int | None]]:
    return [(q.state.bits, q.state.position) for _, quantizers in quantizer_sets(model) for _, q in quantizers]


def prepared(model: nn.Module, **settings):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    return cnmix.initialize(model, optimizer, steps_per_epoch=10_000, **settings)


@pytest.mark.parametrize("settings", [{}, {"online": True}, {"saturation": 0.0}, {"mode": "fixed_interval"}])
def test_exactly_the_first_iterations_measure(net, step, settings) -> None:
    model, optimizer = prepared(net(), **settings)
    if settings.get("mode") == "fixed_interval":
        cnmix.core.cnmix_set_amp_use_online(True)
    for seed in range(COUNT):
        step(model, optimizer, seed)
        assert set(updates(model).values()) == {seed + 1}
    before = formats(model)
    for seed in range(5):
        step(model, optimizer, seed)
    assert set(updates(model).values()) == {COUNT}
    assert formats(model) == before
    assert [q.state.step for _, quantizers in quantizer_sets(model) for _, q in quantizers] == [COUNT + 5] * 9


def test_the_o3_level_closes_too(net, step) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    cnmix.initialize(model, optimizer, "O3")
    for seed in range(COUNT + 2):
        step(model, optimizer, seed)
    assert set(updates(model).values()) == {COUNT}


def test_evaluation_counts_nothing(net, step, batch) -> None:
    model, optimizer = prepared(net())
    for seed in range(COUNT):
        step(model, optimizer, seed)
        model.eval()
        model(batch(seed)[0])
        model.train()
        with torch.no_grad():
            model(batch(seed)[0])
    assert set(updates(model).values()) == {COUNT}


def test_micro_batches_count(net, backward) -> None:
    model, optimizer = prepared(net())
    for seed in range(2 * COUNT):
        backward(model, optimizer, seed)
    assert set(updates(model).values()) == {COUNT}


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_forward_pass_that_checkpointing_repeats_counts_nothing(reentrant: bool) -> None:
    torch.manual_seed(0)
    parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    model, optimizer = prepared(parts)
    for _ in range(COUNT + 2):
        x = torch.randn(5, 4, requires_grad=True)
        for part in model:
            x = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=reentrant)
        x.sum().backward()
        optimizer.step()
    assert set(updates(model).values()) == {COUNT}


class Sequences(nn.Module):
    """A recurrent layer, attention, and a convolution by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.attention = nn.LSTM(4, 8, batch_first=True), nn.MultiheadAttention(8, 2, batch_first=True)
        self.kernel = nn.Parameter(torch.randn(8, 8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.lstm(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        return nn.functional.conv1d(y.transpose(1, 2), self.kernel)


def test_sequences_attention_and_functions_close() -> None:
    torch.manual_seed(0)
    model, optimizer = prepared(Sequences())
    for seed in range(COUNT + 3):
        model(torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = updates(model)
    assert found.pop("attention..value_gradient.grad_output") == 0  # that product has no gradient of its own
    assert set(found.values()) == {COUNT}


class Late(nn.Module):
    """Calls a function, and a module, for the first time in a later iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.later, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        y = self.first(x)
        return y + self.later(y) @ y.T @ y if self.calls > COUNT + 1 else y


def test_what_comes_later_is_measured_once() -> None:
    model, optimizer = prepared(Late())
    for seed in range(COUNT + 4):
        model(torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = updates(model)
    assert len(found) == 12
    assert {name: times for name, times in found.items() if times > 1} == {
        f"first.{operand}": COUNT for operand in ("input", "weight", "grad_output")
    }


def test_zeros_are_looked_at_until_there_is_something() -> None:
    model, _ = prepared(nn.Linear(4, 4))
    for iteration in range(COUNT + 4):
        x = torch.zeros(5, 4) if iteration < COUNT + 1 else torch.ones(5, 4)
        model(x).sum().backward()
    assert [*updates(model).values()] == [1, COUNT, COUNT]


def test_copies(net, step) -> None:
    model, optimizer = prepared(net())
    step(model, optimizer)
    fresh = copy.deepcopy(model)
    for seed in range(COUNT):
        step(model, optimizer, seed)
    closed = pickle.loads(pickle.dumps(model))
    for seed in range(COUNT + 2):  # a copy goes on counting
        for each in (fresh, closed):
            each(torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    assert set(updates(fresh).values()) == set(updates(closed).values()) == {COUNT}


def test_initialize_without_the_variable_opens_it_again(net, step, monkeypatch) -> None:
    model, optimizer = prepared(net())
    for seed in range(COUNT + 2):
        step(model, optimizer, seed)
    prepared(model)  # as it is
    step(model, optimizer)
    assert set(updates(model).values()) == {COUNT}
    monkeypatch.delenv("MLU_ADAPTIVE_STRATEGY_COUNT")
    prepared(model)
    for seed in range(COUNT + 2):
        step(model, optimizer, seed)
    assert set(updates(model).values()) == {2 * COUNT + 2}


def test_without_the_variable_it_never_closes(net, step, monkeypatch) -> None:
    for value in (None, "", "0"):
        if value is None:
            monkeypatch.delenv("MLU_ADAPTIVE_STRATEGY_COUNT")
        else:
            monkeypatch.setenv("MLU_ADAPTIVE_STRATEGY_COUNT", value)
        model, optimizer = prepared(net())
        for seed in range(COUNT + 3):
            step(model, optimizer, seed)
        assert set(updates(model).values()) == {COUNT + 3}


@pytest.mark.parametrize("value", ["-1", "1.5", "many", "١", "9" * 5000])
def test_a_bad_value_is_refused_before_anything_changes(value: str, net, monkeypatch) -> None:
    monkeypatch.setenv("MLU_ADAPTIVE_STRATEGY_COUNT", value)
    model = net()
    for level in ("O0", "O1"):
        with pytest.raises(ValueError, match="MLU_ADAPTIVE_STRATEGY_COUNT must be a whole number"):
            cnmix.initialize(model, None, level)
    assert type(model) is Net
    assert type(model.fc1) is nn.Linear
    assert not cnmix.state_dict()["models"]


def test_the_log_says_so(net, step, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="cnmix"):
        model, optimizer = prepared(net())
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "accuracy of such a run is not valid" in caplog.text
        for seed in range(COUNT + 1):
            step(model, optimizer, seed)
    assert caplog.messages[-1] == "the adaptive strategy closed after 3 iterations: widths and positions stay"


def test_the_state_of_a_closed_model_is_an_ordinary_one(net, step, monkeypatch) -> None:
    model, optimizer = prepared(net())
    for seed in range(COUNT + 2):
        step(model, optimizer, seed)
    state = cnmix.state_dict()
    monkeypatch.delenv("MLU_ADAPTIVE_STRATEGY_COUNT")
    del model, optimizer
    gc.collect()
    other, other_optimizer = prepared(net())
    cnmix.load_state_dict(state)
    for seed in range(3):
        step(other, other_optimizer, seed)
    assert set(updates(other).values()) == {COUNT + 3}
