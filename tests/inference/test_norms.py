"""Batch norms as stages of chains: the kernel's bits, or no stages."""

import pytest
import torch
from kernels.strategies import nearly_cancelling, rounded_once
from torch import nn

from cnmix import inference
from cnmix.inference import norms
from cnmix.inference.nodes import Call
from cnmix.inference.program import Program, Ref, Spec, Step, find_operator
from cnmix.kernels import plan

CHANNELS = 19
LAYOUTS = [
    ((6, CHANNELS), torch.contiguous_format),
    ((2, CHANNELS, 33), torch.contiguous_format),
    ((2, CHANNELS, 9, 7), torch.contiguous_format),
    ((2, CHANNELS, 9, 7), torch.channels_last),
    ((2, CHANNELS, 3, 5, 4), torch.contiguous_format),
    ((2, CHANNELS, 3, 5, 4), torch.channels_last_3d),
]
OPERATORS = ["aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default"]


def test_fused_multiply_add_is_exact_before_it_rounds():
    for channels in (5, 48):
        x, factors, terms = nearly_cancelling(40, channels)
        assert torch.equal(norms.fused_multiply_add(x, factors, terms), rounded_once(x, factors, terms))
    tiny = 2.0**-70  # sums are subnormal
    x, factors, terms = x * tiny, factors * tiny, terms * tiny * tiny
    assert torch.equal(norms.fused_multiply_add(x, factors, terms), rounded_once(x, factors, terms))
    found = norms.fused_multiply_add(
        torch.tensor([torch.inf, torch.nan, 3e38, 0.0, -0.0]), torch.ones(5), -torch.zeros(5)
    )
    assert found.tolist()[0] == torch.inf
    assert found[1].isnan()
    assert found[2] == torch.tensor(3e38)
    assert found[3:].signbit().tolist() == [False, True]


def program(x, operator=OPERATORS[1], **changes):
    """A program of one batch norm."""
    generator = torch.Generator().manual_seed(3)
    weight, bias, mean, variance = torch.randn(4, CHANNELS, generator=generator)
    constants = {"weight": weight, "bias": bias, "mean": mean, "variance": variance.square() + 0.1} | changes
    arguments = [Ref(name) if constants[name] is not None else None for name in ("weight", "bias", "mean", "variance")]
    settings, outputs = (
        ([False, 0.1, 1e-5, False], ["y"]) if "legit" not in operator else ([0.1, 1e-5], ["y", None, None])
    )
    step = Step(operator, [Ref("x"), *arguments, *settings], {}, outputs)
    return Program(["x"], ["y"], [step], constants, {"x": Spec.of(x), "y": Spec.of(x)})


def computed(stages, x):
    by_channel = (-1, *[1] * (x.dim() - 2))
    (stage,) = stages
    assert stage.kind == "multiply_add"
    return norms.fused_multiply_add(x, *(each.view(by_channel) for each in stage.operand))


def assert_same(a, b):
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))
    assert torch.equal(a.signbit() | a.isnan(), b.signbit() | b.isnan())


@pytest.fixture
def _once():
    if not norms._rounds_once():
        pytest.skip("this build of torch rounds batch norms twice")


@pytest.mark.usefixtures("_once")
@pytest.mark.parametrize(("shape", "order"), LAYOUTS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_stages_compute_what_the_kernel_computes(shape, order, operator):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 9).contiguous(memory_format=order)
    for channel, value in enumerate((torch.nan, torch.inf, -torch.inf, -0.0)):
        x[0, channel] = value
    for changes in (
        {},
        {"weight": None},
        {"bias": None},
        {"weight": torch.zeros(CHANNELS), "bias": -torch.zeros(CHANNELS)},
    ):
        made = program(x, operator, **changes)
        assert_same(computed(norms.norm_stages(made)[0], x), made.run(x)[0])


def test_what_the_kernel_computes_in_another_way_stays_a_call():
    x = torch.randn(2, CHANNELS, 9, 7)
    assert norms.norm_stages(program(x.transpose(2, 3))) == {}
    assert norms.norm_stages(program(torch.empty((2, CHANNELS, 9, 14))[..., ::2])) == {}
    assert norms.norm_stages(program(x, weight=torch.randn(CHANNELS, 2)[:, 0])) == {}
    assert norms.norm_stages(program(x.double())) == {}
    assert norms.norm_stages(program(x, variance=torch.full((CHANNELS,), torch.nan))) == {}
    statistics = program(x, OPERATORS[0])
    statistics.steps[0].arguments[5] = True
    assert norms.norm_stages(statistics) == {}
    given = program(x)
    given.inputs.append("weight")
    del given.constants["weight"]
    assert norms.norm_stages(given) == {}
    more = program(x)
    more.steps[0].outputs[1] = "saved"
    assert norms.norm_stages(more) == {}


def replaced(monkeypatch, compute):
    """Lets another build's kernel take the place of this one's."""
    kernel = find_operator(OPERATORS[1])

    def other(x, weight, bias, mean, variance, *settings):
        factor = kernel(torch.ones(1, CHANNELS), weight, None, torch.zeros(CHANNELS), variance, *settings)[0]
        term = kernel(torch.zeros(1, CHANNELS), weight, bias, mean, variance, *settings)[0]
        return compute(x, factor, term), None, None

    monkeypatch.setattr(norms, "find_operator", lambda name: other)


def test_builds_that_round_otherwise(monkeypatch):
    x = torch.randn(2, CHANNELS)
    monkeypatch.setattr(norms, "_rounds_once", lambda: False)
    replaced(monkeypatch, lambda x, factor, term: x * factor + term)
    made = program(x)
    (stages,) = norms.norm_stages(made).values()
    assert [stage.kind for stage in stages] == ["multiply", "add"]
    replaced(monkeypatch, lambda x, factor, term: norms.fused_multiply_add(x, factor, term))
    assert norms.norm_stages(made) == {}
    monkeypatch.setattr(norms, "_rounds_once", lambda: None)
    assert norms.norm_stages(made) == {}


class Float(nn.Module):
    """A float convolution and its batch norm, and one that an integer product follows."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


def test_batch_norms_of_float_parts_stay_calls():
    model = Float().eval()
    x = torch.randn(2, 3, 8, 8)
    fused = inference.fuse(model, x)
    with torch.no_grad():
        assert torch.equal(fused(x), model(x))
    assert all(isinstance(part, Call) for part in fused.first.parts)
    assert len(fused.first.parts) == 3 * plan.serves()
