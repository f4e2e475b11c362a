"""Every model of the matrix: right at int31, on the core and learning at O1, and saved and loaded to the bit."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from zoo import CASES, Case, loss_of

import cnmix

STEPS_PER_EPOCH = 20
EVERY_MODEL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def start(case: Case, level: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = case.build()
    optimizer = torch.optim.AdamW(model.parameters(), case.learning_rate)
    return cnmix.initialize(model, optimizer, opt_level=level, steps_per_epoch=STEPS_PER_EPOCH)


def train(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    batch, losses = case.batch(), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        with cnmix.scale_loss(loss, optimizer) as scaled_loss:
            scaled_loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def gradients(case: Case, model: nn.Module) -> tuple[Tensor, dict[str, Tensor | None]]:
    loss = loss_of(model, case.batch())
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@EVERY_MODEL
def test_int31_is_float32(case: Case) -> None:
    model = case.build()
    cnmix.initialize(model, bitwidth=31, max_bitwidth=31)
    loss, ours = gradients(case, model)
    expected_loss, expected = gradients(case, case.build())
    assert abs(loss - expected_loss) <= 1e-4 * expected_loss
    whole = torch.cat([each.flatten() for each in expected.values() if each is not None]).norm()
    for name, gradient in expected.items():
        if gradient is None:
            assert ours[name] is None, name
            continue
        # Some gradients are zero but for float32's own rounding, as of a bias that softmax takes away again.
        close = 1e-4 * max(gradient.norm(), 1e-3 * whole)
        assert (ours[name] - gradient).norm() <= close, name


@EVERY_MODEL
def test_products_are_on_the_core(case: Case) -> None:
    model, _ = start(case, "O1")
    counted = cnmix.executed_products(model, **case.batch())
    assert counted.share >= 0.99, counted
    assert not counted.unknown, counted


@EVERY_MODEL
def test_learns_as_float32_does(case: Case) -> None:
    float32 = train(case, *start(case, "O0"), steps=40)
    losses = train(case, *start(case, "O1"), steps=40)
    # The last five steps, on which float32 has learned and has still something to learn.
    reached, expected = sum(losses[-5:]) / 5, sum(float32[-5:]) / 5
    assert 0.05 < expected / float32[0] < 0.65
    assert abs(reached / expected - 1) <= 0.05


@EVERY_MODEL
def test_state_dict_is_a_plain_models(case: Case) -> None:
    model = case.build()
    before, parameters = model.state_dict(keep_vars=True), dict(model.named_parameters(remove_duplicate=False))
    optimizer = torch.optim.AdamW(model.parameters(), case.learning_rate)
    cnmix.initialize(model, optimizer)
    train(case, model, optimizer, 1)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    now = dict(model.named_parameters(remove_duplicate=False))
    assert list(now) == list(parameters)
    assert all(now[name] is parameters[name] for name in parameters)
    plain = case.build()
    assert {name: (each.shape, each.dtype) for name, each in plain.state_dict().items()} == {
        name: (each.shape, each.dtype) for name, each in after.items()
    }
    plain.load_state_dict(model.state_dict(), strict=True)


@EVERY_MODEL
def test_goes_on_from_a_checkpoint_to_the_bit(case: Case) -> None:
    model, optimizer = start(case, "O1")
    train(case, model, optimizer, 3)
    file = io.BytesIO()
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "cnmix": cnmix.state_dict(model)}, file
    )
    losses = train(case, model, optimizer, 2)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, its_optimizer = start(replace(case, seed=case.seed + 1), "O1")
    again.load_state_dict(saved["model"])
    its_optimizer.load_state_dict(saved["optimizer"])
    cnmix.load_state_dict(saved["cnmix"], again)
    assert train(case, again, its_optimizer, 2) == losses
    ours, theirs = model.state_dict(), again.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert cnmix.state_dict(model) == cnmix.state_dict(again)
