"""Groups of a traced graph: how it is cut, what is printed and what is written of it."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from traced_networks import Branching, images, made, quantized

from cnmix.torch_mlu.fusion_groups import FusionGroup

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]

NETWORK = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU6()).eval()


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("DEBUG_FORCED_FALLBACK_OPS", "FUSED_KERNEL_DEBUG", "TORCH_MIN_CNLOG_LEVEL", "MM_CPP_MIN_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    loggers = [logging.getLogger(name) for name in ("torch_mlu", "torch_mlu.magicmind")]
    levels = [logger.level for logger in loggers]
    with torch.no_grad():
        yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def traced():
    return torch.jit.trace(NETWORK.to("cpu"), images()).to("mlu")


def parts(module):
    """The last program's parts: what is in each group, and each step between them."""
    program = [each[0] for each in module.forward._made.values()][-1]
    return [
        [name(step) for step in part.program.steps] if isinstance(part, FusionGroup) else name(part)
        for part in program.parts
    ]


def name(step):
    return step.operator.split(".")[1]


@pytest.mark.parametrize(
    ("forced", "expected"),
    [
        ("", [["convolution", "relu", "max_pool2d", "hardtanh"]]),
        ("aten::relu", [["convolution"], "relu", ["max_pool2d", "hardtanh"]]),
        ("max_pool2d, relu_", [["convolution"], "relu", "max_pool2d", ["hardtanh"]]),
        ("aten::conv2d", ["convolution", ["relu", "max_pool2d", "hardtanh"]]),
        ("aten::_convolution,aten::hardtanh.out,", ["convolution", ["relu", "max_pool2d"], "hardtanh"]),
        ("topk", [["convolution", "relu", "max_pool2d", "hardtanh"]]),
    ],
)
def test_operators_are_forced_out_of_groups(forced, expected, traced, monkeypatch):
    x = images().mlu()
    first = traced(x)
    monkeypatch.setenv("DEBUG_FORCED_FALLBACK_OPS", forced)
    assert torch.equal(traced(x), first)
    assert parts(traced) == expected


def test_quantized_products_are_forced_out_by_their_names(monkeypatch):
    x = images()
    model = quantized(NETWORK.to("cpu"), x, "int8")
    model = torch.jit.trace(model, x, check_trace=False).to("mlu")
    first = model(x.mlu())
    for forced in ("torch_mlu::quantized_convolution", "conv2d"):
        monkeypatch.setenv("DEBUG_FORCED_FALLBACK_OPS", forced)
        assert torch.equal(model(x.mlu()), first)
        assert parts(model) == ["integer_convolution", ["relu", "max_pool2d", "hardtanh"]]


def test_an_operator_that_is_none_is_refused(traced, monkeypatch):
    monkeypatch.setenv("DEBUG_FORCED_FALLBACK_OPS", "relu,convolute")
    with pytest.raises(ValueError, match="no operator 'convolute'"):
        traced(images().mlu())


@pytest.mark.parametrize(("backend", "prefix"), [("cnnl", "catch_cnnl"), ("cpu", "cpu")])
def test_results_of_groups_are_written(backend, prefix, monkeypatch):
    torch.manual_seed(0)
    model, x = Branching(), images(5, 8)
    traced = torch.jit.trace(model, x, strict=False).to("mlu")
    expected = traced(x.mlu())
    assert not list(Path().iterdir())
    monkeypatch.setenv("FUSED_KERNEL_DEBUG", backend)
    found = traced(x.mlu())
    assert torch.equal(found["scores"], expected["scores"])
    written = {path.name: path.read_text() for path in Path().iterdir()}
    groups = [f"MLUFusionGroup{number}_0" for number in (0, 1)]
    prefixes = ("mmouttensor", f"{prefix}_jitouttensor")
    assert set(written) == {f"{each}_{group}" for group in groups for each in prefixes}
    header, *values = written["mmouttensor_MLUFusionGroup1_0"].splitlines()
    assert header == "Tensor : Type = Float : Shape = [5, 4] : Stride = [4, 1] : Dumped = 20"
    assert [float(each) for each in values] == pytest.approx(expected["scores"].flatten().tolist(), rel=1e-5)
    for group in groups:
        assert len({written[f"{each}_{group}"] for each in prefixes}) == 1


def test_the_cpu_computes_floats_where_the_card_has_integers(monkeypatch):
    x, model = images(), made()
    integer = quantized(model, x, "int8", {"per_channel": True})
    traced = torch.jit.trace(integer, x, check_trace=False).to("mlu")
    written = {}
    for backend in ("cnnl", "cpu"):
        monkeypatch.setenv("FUSED_KERNEL_DEBUG", backend)
        traced(x.mlu())
        written |= {path.name: path.read_text().splitlines() for path in Path().iterdir()}
    ours, cnnl, cpu = (
        written[f"{each}_MLUFusionGroup0_0"] for each in ("mmouttensor", "catch_cnnl_jitouttensor", "cpu_jitouttensor")
    )
    assert ours == cnnl
    assert ours != cpu
    assert [float(each) for each in ours[1:]] == pytest.approx([float(each) for each in cpu[1:]], abs=0.05)


def test_another_backend_is_refused(traced, monkeypatch):
    monkeypatch.setenv("FUSED_KERNEL_DEBUG", "gpu")
    with pytest.raises(ValueError, match="take 'cnnl' or 'cpu'"):
        traced(images().mlu())


def test_the_graph_is_printed_at_debug(monkeypatch, capsys):
    torch.manual_seed(0)
    traced, x = torch.jit.trace(Branching(), images(5, 8), strict=False).to("mlu"), images(5, 8).mlu()
    with monkeypatch.context() as environment:
        environment.setenv("TORCH_MIN_CNLOG_LEVEL", "-1")
        traced(x)
    printed = capsys.readouterr().err
    assert "= mlu::MLUFusionGroup_0(%" in printed
    assert "aten::topk(%" in printed
    assert "with mlu::MLUFusionGroup_1 = graph(%" in printed
    assert ": Float(5, 4) = aten::linear(%" in printed
    assert "[torch_mlu.magicmind]" not in printed
    traced(x)
    assert not capsys.readouterr().err  # when it is made, not when it runs


def test_the_fused_backend_has_lines_of_its_own(traced, monkeypatch, capsys):
    with monkeypatch.context() as environment:
        environment.setenv("MM_CPP_MIN_LOG_LEVEL", "0")
        traced(images().mlu())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("[INFO]")
    assert "[torch_mlu.magicmind]" in line
    assert line.endswith("MLUFusionGroup_0 computes 4 operators")
