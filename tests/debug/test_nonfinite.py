import logging
import math

import pytest
import torch
import torch.nn.functional as F
from debugged_networks import Many, loss, random
from torch import nn
from torch.utils.checkpoint import checkpoint

import cnmix
import cnmix.debug


class Breaks(nn.Module):
    """Two layers, and between them what is wrong in the third step."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.fault = ""

    def forward(self, x):
        y = self.first(x)
        if self.fault == "log":
            y = torch.log(-y.abs())
        elif self.fault == "sqrt":
            y = y + torch.sqrt(y * 0)
        elif self.fault == "scores":
            y = F.scaled_dot_product_attention(y[None] * math.inf, y[None], y[None])[0]
        elif self.fault == "masked":
            mask = torch.full((len(x), len(x)), -math.inf).triu(1)
            y = F.scaled_dot_product_attention(y[None], y[None], y[None], attn_mask=mask)[0]
        return self.second(y)


def broken(level, fault):
    """Trains for two steps, then breaks something; returns what is found in the third."""
    torch.manual_seed(0)
    model, x = Breaks(), random(4, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    cnmix.initialize(model, optimizer, level)
    with cnmix.debug.detect_nonfinite(model, raises=False, first_step=10) as watch:
        for step in range(4):
            if step == 2:
                model.fault = fault
                if fault == "weight":
                    model.second[0].weight.data[0, 0] = math.inf
                elif fault == "input":
                    x[0, 0] = math.nan
            total = loss(model(x))
            if step == 2 and fault == "loss":
                total = total * 1e38 * 1e38
            optimizer.zero_grad()
            total.backward()
            if step == 2 and fault == "gradient":
                return watch.found
            optimizer.step()
    return watch.found


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
@pytest.mark.parametrize(
    ("fault", "module", "operand", "value", "backward"),
    [
        ("input", "", "input", "NaN", False),
        ("weight", "second.0", "weight", "infinity", False),
        ("log", "second", "input", "NaN", False),
        ("sqrt", "first", "grad_output", "NaN", True),
        ("loss", "second.1", "grad_output", "infinity", True),
    ],
)
def test_first_is_found_with_module_operand_and_step(level, fault, module, operand, value, backward):
    found = broken(level, fault)
    assert (found.module, found.operand, found.backward) == (module, operand, backward)
    assert found.value == value or fault == "loss"  # by the sign of the gradient
    assert found.step == 12
    assert f"in {operand} of {module!r}" in str(found) or not module


@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
@pytest.mark.parametrize("fault", ["", "masked"])
def test_what_is_no_fault_is_not_found(level, fault):
    assert broken(level, fault) is None


def test_operand_of_a_function_on_the_core_is_named():
    found = broken("O1", "scores")
    assert found.module.startswith("Breaks..forward")
    assert (found.operand, found.value) in [("query", "infinity"), ("query", "-infinity")]
    assert broken("O0", "scores").module == "second"  # in float functions are not looked at


def test_it_raises_and_leaves_no_hooks():
    torch.manual_seed(0)
    model, x = Many(), random(3, 6, 16)
    cnmix.initialize(model, None, "O1")
    hooks = {each: (dict(each._forward_hooks), dict(each._forward_pre_hooks)) for each in model.modules()}
    with cnmix.debug.detect_nonfinite(model) as watch:
        loss(model(x)).backward()
    assert watch.found is None
    with torch.no_grad():
        model.attention.out.bias[3] = math.nan
    with (
        pytest.raises(FloatingPointError, match=r"NaN in bias of 'attention\.out', in the forward pass of step 7,"),
        cnmix.debug.detect_nonfinite(model, first_step=7),
    ):
        model(x)
    loss(model(x))  # nothing looks any longer
    assert hooks == {each: (each._forward_hooks, each._forward_pre_hooks) for each in model.modules()}
    assert not any(each._backward_hooks for each in model.parameters())


def test_gradient_of_a_parameter_is_looked_at():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return x * self.scale.sqrt()

    model = nn.Sequential(nn.Linear(4, 4), Own())
    with cnmix.debug.detect_nonfinite(model, raises=False) as watch:
        loss(model(random(2, 4)) + 1).backward()
    assert str(watch.found).startswith("infinity in gradient of scale of '1', in the backward pass of step 0") or str(
        watch.found
    ).startswith("-infinity in gradient of scale of '1'")


def test_module_whose_backward_pass_made_it_is_named():
    class Root(nn.Module):
        def forward(self, x):
            return (x - x.detach()).sqrt()

    model = nn.Sequential(nn.Linear(4, 4), Root())
    with cnmix.debug.detect_nonfinite(model, raises=False) as watch:
        model(random(2, 4)).sum().backward()
    assert (watch.found.module, watch.found.operand, watch.found.users) == ("0", "grad_output", ("1",))
    assert str(watch.found).endswith("; the backward pass of '1' made it")


def test_steps_are_those_of_the_models_optimizer():
    model, other = nn.Linear(4, 4), nn.Linear(4, 4)
    own, foreign = (torch.optim.SGD(each.parameters(), 0.1) for each in (model, other))
    second = torch.optim.SGD(model.parameters(), 0.1)
    with cnmix.debug.detect_nonfinite(model) as watch:
        for _ in range(3):
            for optimizer in (foreign, own, second):
                optimizer.step()
    assert watch.step == 3


def test_the_first_alone_is_logged(caplog):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with caplog.at_level(logging.WARNING, "cnmix"), cnmix.debug.detect_nonfinite(model, raises=False):
        for _ in range(2):
            model(random(2, 4) * math.nan).sum().backward()
    assert [record.getMessage() for record in caplog.records] == [
        "NaN in input of the model, in the forward pass of step 0, the first that was found"
    ]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_and_compiled_parts_are_looked_at(reentrant):
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    model = nn.Sequential(nn.Linear(4, 4), Part())
    cnmix.initialize(model, None, "O1")
    compiled = torch.compile(model, backend="eager")
    with cnmix.debug.detect_nonfinite(compiled) as watch:
        compiled(random(2, 4)).sum().backward()
    assert watch.found is None
    with torch.no_grad():
        model[1].inner.weight[0, 0] = math.nan
    with (
        pytest.raises(FloatingPointError, match=r"NaN in weight of '1\.inner'"),
        cnmix.debug.detect_nonfinite(compiled),
    ):
        compiled(random(2, 4))


def test_other_dtypes_are_looked_at():
    class Spectrum(nn.Module):
        def forward(self, x):
            return torch.fft.rfft(x) / 0

    model = nn.Sequential(nn.Linear(4, 4), Spectrum())
    model.register_buffer("table", torch.zeros(3).to(torch.float8_e4m3fn))
    with cnmix.debug.detect_nonfinite(model, raises=False) as watch:
        model(random(2, 4))
    assert (watch.found.module, watch.found.operand) == ("1", "output")
    model.table = torch.full((3,), math.nan).to(torch.float8_e4m3fn)
    with cnmix.debug.detect_nonfinite(model, raises=False) as watch:
        model(random(2, 4))
    assert (watch.found.module, watch.found.operand, watch.found.value) == ("", "table", "NaN")


def test_nothing_is_found_afterwards():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    cnmix.initialize(model, None, "O1")
    with cnmix.debug.detect_nonfinite(model) as watch:
        total = model(random(2, 4)).sum()
    (total * math.nan).backward()  # of what was computed within
    assert watch.found is None
