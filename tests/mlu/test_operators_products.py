"""Products on cards that multiply integers: near the host's float32, as the vendor's operator tests ask for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from operator_tables import Row
from operators_of_networks import NETWORKS
from test_card_operators import run
from torch import Tensor, nn

import cnmix.torch_mlu
from cnmix.torch_mlu.core import mlu_model
from cnmix.torch_mlu.core.mlu_quantize import quantize_dynamic_mlu

NAMES = (
    *("mm", "bmm", "matmul", "mv", "dot", "addmm", "addmv", "baddbmm", "addbmm"),
    *("einsum", "tensordot", "linear", "bilinear"),
    *("conv1d", "conv2d", "conv2d.depthwise", "conv2d.dilated", "conv3d", "conv_transpose1d", "conv_transpose2d"),
    *("scaled_dot_product_attention", "rnn_tanh_cell", "rnn_relu_cell", "gru_cell", "lstm_cell"),
)
PRODUCTS = [operator for operator in NETWORKS if operator.name in NAMES]
BOUND = 0.02  # of the mean square error


@pytest.fixture(autouse=True)
def width_as_before() -> Iterator[None]:
    yield
    mlu_model.set_quantized_bitwidth(31)


def mean_square_error(found: Tensor, expected: Tensor) -> float:
    return (found.detach().cpu().double() - expected.detach().double()).square().mean().item()


@pytest.mark.parametrize(("bits", "bound"), [(8, BOUND), (16, BOUND * 1e-3), (31, BOUND * 1e-6)])
@pytest.mark.parametrize("card_name", ["MLU220", "MLU270", "MLU290"])
@pytest.mark.parametrize("operator", PRODUCTS, ids=lambda operator: operator.name)
def test_a_product_is_near_the_hosts(operator: Row, card_name: str, bits: int, bound: float) -> None:
    cnmix.torch_mlu.install(card_name=card_name)
    mlu_model.set_quantized_bitwidth(bits)
    for found, expected in zip(run(operator, "float32", "mlu"), run(operator, "float32", "cpu"), strict=True):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert a.device == torch.device("mlu:0")
            assert a.shape == b.shape
            assert mean_square_error(a, b) < bound


MODULES = {
    "Linear": (lambda: nn.Linear(16, 5), (4, 16)),
    "Linear without bias": (lambda: nn.Linear(16, 5, bias=False), (2, 4, 16)),
    "Conv1d": (lambda: nn.Conv1d(4, 5, 3), (2, 4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 5, 3, stride=2, padding=1), (2, 4, 8, 8)),
    "Conv2d depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 8, 8)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
}


@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("card_name", ["MLU270", "MLU370"])
@pytest.mark.parametrize("name", MODULES)
def test_a_quantized_module_is_near_the_floats(name: str, card_name: str, dtype: str) -> None:
    cnmix.torch_mlu.install(card_name=card_name)
    torch.manual_seed(0)
    make, shape = MODULES[name]
    model = nn.Sequential(make()).eval()
    x = torch.randn(shape)
    generating = quantize_dynamic_mlu(model, {"per_channel": False}, dtype=dtype, gen_quant=True)
    with torch.no_grad():
        generating(x)
        made = quantize_dynamic_mlu(model)
        made.load_state_dict(generating.state_dict())
        found, expected = made.to("mlu")(x.to("mlu")), model(x)
    assert found.device == torch.device("mlu:0")
    assert mean_square_error(found, expected) < BOUND
