"""Traced modules compute on the card, in fusion groups, what the model computes there operator by operator."""

import copy
import io
import logging

import pytest
import torch
from torch import nn
from traced_networks import Branching, Residual, images, made, quantized

import cnmix
import cnmix.inference
from cnmix.torch_mlu.core import mlu_model as ct
from cnmix.torch_mlu.fusion_groups import FusionGroup
from cnmix.torch_mlu.traced_modules import FusingForward

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def groups(module):
    """How many steps each group has that the module has made so far, by its name."""
    found = [each[0].parts for each in module.forward._made.values() if each is not None]
    return [{part.name: len(part.program.steps) for part in parts if isinstance(part, FusionGroup)} for parts in found]


def same(found, expected):
    return all(
        torch.equal(a, b) and a.is_mlu and (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        for a, b in zip(found, expected, strict=True)
    )


def warnings(caplog):
    return [record for record in caplog.records if record.name == "torch_mlu"]


PER_CHANNEL = {"per_channel": True}
FIRST = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("dtype", "qconfig", "half"),
    [
        ("float", None, False),
        ("float", None, True),
        ("int8", None, False),
        ("int8", None, True),
        ("int8", PER_CHANNEL, False),
        ("int8", PER_CHANNEL | FIRST, False),
        ("int16", PER_CHANNEL, True),
        ("int16", FIRST, False),
    ],
)
def test_the_same_bits_fused_and_not(dtype, qconfig, half, norms):
    x = images()
    model = made(norms) if dtype == "float" else quantized(made(norms), x, dtype, qconfig)
    x = x * 255 if qconfig is not None and "mean" in qconfig else x
    traced = torch.jit.trace(model, x, check_trace=False).to("mlu")  # made on the host, and moved
    model.to("mlu")
    if half:
        traced.half(), model.half()
        x = x.half()
    expected = model(x.mlu())
    assert same(traced(x.mlu()), expected)
    assert same(traced(x.mlu()), expected)
    assert groups(traced)
    other = images(3, 3, 20, 12).to(x.dtype).mlu()  # other shapes than those of the trace
    assert same(traced(other), model(other))
    assert len(groups(traced)) == 2


def test_a_trace_that_was_made_on_the_card():
    x = images().to("mlu:1")
    model = quantized(made(), images(), "int8").to("mlu:1")
    traced = torch.jit.trace(model, x, check_trace=False)
    found = traced(x)
    assert same(found, model(x))
    assert groups(traced) == [{"MLUFusionGroup_0": groups(traced)[0]["MLUFusionGroup_0"]}]
    assert {each.device.index for each in found} == {1}


def test_a_model_that_was_trained_in_fixed_point():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    plain = copy.deepcopy(model)
    cnmix.initialize(model, optimizer, opt_level="O1", steps_per_epoch=10)
    x = images(4, 3, 8, 8)
    with torch.enable_grad():
        model(x).square().mean().backward()
    checkpoint = {"state_dict": model.state_dict(), "cnmix": cnmix.state_dict(model)}
    integer = cnmix.inference.load(plain, checkpoint)
    expected = integer(x)
    traced = torch.jit.trace(integer, x, check_trace=False).to("mlu")
    found = traced(x.mlu())
    assert torch.equal(found.cpu(), expected)
    assert torch.equal(found.cpu(), cnmix.inference.fuse(plain.cpu(), x)(x))
    assert groups(traced) == [{"MLUFusionGroup_0": 6}]


def test_what_the_fused_backend_lacks_runs_on_the_operator_backend():
    torch.manual_seed(0)
    model, x = Branching().mlu(), images(5, 8).mlu()
    traced = torch.jit.trace(model, x, strict=False)
    found, expected = traced(x), model(x)
    assert found.keys() == expected.keys()
    assert same(found.values(), expected.values())
    assert groups(traced) == [{"MLUFusionGroup_0": 2, "MLUFusionGroup_1": 1}]


def test_a_card_without_float_products_fuses_integers_alone():
    cnmix.torch_mlu.install(card_name="MLU270")
    x = images().mlu()
    for model, fused in ((made().mlu(), 0), (quantized(made(), images(), "int8").mlu(), 4)):
        traced = torch.jit.trace(model, x, check_trace=False)
        assert same(traced(x), model(x))
        (parts,) = (made[0].parts for made in traced.forward._made.values())
        steps = [step for part in parts if isinstance(part, FusionGroup) for step in part.program.steps]
        assert sum("convolution" in step.operator or "linear" in step.operator for step in steps) == fused + bool(fused)


def test_the_switch():
    x, traced = images().mlu(), torch.jit.trace(made(), images()).to("mlu")
    ct._jit_override_can_fuse_on_mlu(False)
    expected = traced(x)
    assert not groups(traced)
    ct._jit_override_can_fuse_on_mlu(True)
    assert same(traced(x), expected)
    assert groups(traced)


def test_with_gradients_it_runs_unfused_and_says_so_once(caplog):
    x, traced = images().mlu(), torch.jit.trace(made(), images()).to("mlu")
    with torch.enable_grad():
        traced(x)[0].sum().backward()
        traced(x)
    assert not groups(traced)
    (record,) = warnings(caplog)
    assert record.levelno == logging.WARNING
    assert "Residual runs operator by operator, not fused: gradients are enabled" in record.getMessage()
    assert next(traced.parameters()).grad is not None


def test_it_stays_a_script_module():
    x, model = images(), made()
    traced = torch.jit.trace(model, x)
    assert isinstance(traced, torch.jit.TopLevelTracedModule)
    assert "aten::_convolution" in str(traced.inlined_graph)
    assert traced.code == traced.forward.code
    assert traced.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(traced(x)[0], model(x)[0])  # on the host as ever
    assert not groups(traced)
    assert torch.equal(copy.deepcopy(traced)(x)[0], model(x)[0])
    assert torch.equal(torch.jit.trace(nn.Sequential(traced), x)(x)[0], model(x)[0])


def test_what_was_saved_runs_fused_when_it_is_loaded():
    x, model = images(), quantized(made(), images(), "int8", PER_CHANNEL)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x, check_trace=False), file)
    file.seek(0)
    loaded = torch.jit.load(file, map_location="mlu")
    assert isinstance(loaded.forward, FusingForward)
    assert same(loaded(x.mlu()), model.to("mlu")(x.mlu()))
    assert groups(loaded)


def test_tensors_that_change_are_followed():
    x = images().mlu()
    model = made(norms=True).mlu()
    traced = torch.jit.trace(model, x)
    first = traced(x)
    model.head.weight.add_(1)
    assert traced.head.weight.data_ptr() == model.head.weight.data_ptr()
    second = traced(x)
    assert same(second, model(x))
    assert not torch.equal(first[0], second[0])
    other = made(norms=True)
    other.norm.running_mean += 1
    traced.load_state_dict(other.state_dict())
    assert same(traced(x), other.mlu()(x))
    assert same(traced.half()(x.half()), other.half()(x.half()))


class Writing(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return x + self.calls


class Several(nn.Module):
    def forward(self, x, others):
        return [x * 2, x + others["y"] + others["z"]]


def until_small(x: torch.Tensor):
    while bool(x.sum() > 1):
        x = x / 2
    return x


class Looping(nn.Module):
    def __init__(self):
        super().__init__()
        self.halve = torch.jit.script(until_small)

    def forward(self, x):
        return self.halve(x).relu()


@pytest.mark.parametrize(("kind", "reason"), [(Writing, "writes to"), (Looping, "prim::Loop")])
def test_what_no_program_can_be_made_of_runs_as_torchscript(kind, reason, caplog):
    x = images(4)
    traced = torch.jit.trace(kind(), x, check_trace=False).to("mlu")
    reference = torch.jit.trace(kind(), x, check_trace=False)
    for _ in range(2):
        assert torch.equal(traced(x.mlu()).cpu(), reference(x))
    (record,) = warnings(caplog)
    assert reason in record.getMessage()


def test_several_inputs_in_structures():
    x, y, z = images(4, 3), images(1, 3), images(4, 1)
    given = (x, {"y": y, "z": z})
    traced = torch.jit.trace(Several(), given, strict=False)
    expected = Several()(*given)
    found = traced(x.mlu(), {"y": y.mlu(), "z": z.mlu()})
    assert torch.equal(found[0].cpu(), expected[0])
    assert torch.equal(found[1].cpu(), expected[1])
    assert groups(traced) == [{"MLUFusionGroup_0": 3}]


def test_what_is_not_finite():
    x, model = images(), quantized(made(), images(), "int8")
    traced, model = torch.jit.trace(model, x, check_trace=False).to("mlu"), model.mlu()
    x[0, 0, 0, 0] = torch.nan
    found, expected = traced(x.mlu()), model(x.mlu())
    assert found[0].isnan().any()
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(found, expected, strict=True))


def test_memory_of_the_card_is_that_of_the_results():
    traced, x = torch.jit.trace(Residual().eval(), images()).to("mlu"), images().mlu()
    traced(x)
    before = ct.memory_allocated()
    found = traced(x)
    assert ct.memory_allocated() - before == sum(512 * -(-each.nbytes // 512) for each in found) or (
        ct.memory_allocated() - before == sum(each.nbytes for each in found)
    )
    del found
    assert ct.memory_allocated() == before


def test_under_the_strict_device():
    cnmix.torch_mlu.install(strict=True)
    x, model = images(), quantized(made(norms=True), images(), "int8", FIRST)
    traced = torch.jit.trace(model, x, check_trace=False).to("mlu")
    assert same(traced(x.mlu()), model.mlu()(x.mlu()))
    assert groups(traced)


def test_inference_mode_and_a_default_device():
    model, x = made(), images()
    traced = torch.jit.trace(model, x).to("mlu")
    expected = model.mlu()(x.mlu())
    with torch.inference_mode():
        assert same(traced(x.mlu()), expected)
    torch.set_default_device("mlu")
    try:
        assert same(traced(images(1, 3, 16, 16).mlu()), model(images(1, 3, 16, 16).mlu()))
    finally:
        torch.set_default_device(None)
    assert len(groups(traced)) == 2


def test_the_host_does_not_fuse_what_computes_in_float_there() -> None:
    from cnmix.torch_mlu.core import mlu_quantize

    quantized = mlu_quantize.quantize_dynamic_mlu(torch.nn.Sequential(torch.nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=r"'0' is a MLULinear of quantize_dynamic_mlu, .* torch\.jit\.trace"):
        cnmix.inference.fuse(quantized, torch.ones(1, 3))
