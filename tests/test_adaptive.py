import dataclasses
import math

import pytest
import torch
from adaptive_samples import (
    SAMPLES,
    TAIL_16,
    TAIL_31,
    gaussian,
    laplace,
    log_normal,
    mostly_zero,
    plain_error,
    quantize,
    student_t,
    trained,
)

from cnmix import QuantizeConfig, kernels
from cnmix.adaptive import OperandQuantizer
from cnmix.fixed_point import FixedPoint, dequantize
from cnmix.measures import quantization_error, update_interval
from cnmix.operand import OperandState


@pytest.mark.parametrize("bits", [8, 16, 31])
@pytest.mark.parametrize("measure", ["mean", "l1"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_error_is_the_formula_in_float64(sample, measure, bits):
    x = SAMPLES[sample]
    error = quantization_error(x, quantize(x, bits), measure)
    # At 31 bits float32 dequantization leaves its own 2**-25.
    assert error == pytest.approx(plain_error(x, bits, measure), rel=1e-6, abs=6e-8 if bits == 31 else 1e-12)


def test_error_of_empty_and_zero_tensors():
    for x in (torch.zeros(0, 3), torch.zeros(4)):
        for measure in ("mean", "l1"):
            assert quantization_error(x, quantize(x, 8), measure) == 0


def test_error_counts_the_lowest_integer():
    x = torch.tensor([-128.0, 1.0])
    assert quantization_error(x, FixedPoint(torch.tensor([-128, 1], dtype=torch.int8), 8, 0)) == 0
    lowest = FixedPoint(torch.tensor([-(2**30), 1], dtype=torch.int32), 31, 0)
    assert quantization_error(torch.tensor([-(2.0**30), 1.0]), lowest) == 0


def test_the_published_measurements():
    n = 2**20
    x = gaussian(n)
    assert quantization_error(x, quantize(x, 8)) == pytest.approx(2e-4, rel=0.7)
    assert quantization_error(x, quantize(x, 8), "l1") == pytest.approx(2.8e-2, rel=0.3)
    x = laplace(n)
    assert quantization_error(x, quantize(x, 8)) == pytest.approx(1e-3, rel=0.7)
    assert quantization_error(x, quantize(x, 8), "l1") == pytest.approx(4.4e-2, rel=0.4)
    x = student_t(n, 3)
    assert 0.03 < quantization_error(x, quantize(x, 8)) < 0.6
    assert trained(QuantizeConfig(), [x]).state.bits == 16
    x = log_normal(n, 3.0)
    assert quantization_error(x, quantize(x, 16)) == pytest.approx(3.7e-2, rel=1)
    assert trained(QuantizeConfig(threshold=0.01), [x]).state.bits == 31
    x = mostly_zero(n)
    assert quantization_error(x, quantize(x, 8)) == pytest.approx(2.9e-4, rel=0.8)
    assert quantization_error(x, quantize(x, 8), "l1") == pytest.approx(2.8e-2, rel=0.3)


@pytest.mark.parametrize(
    ("error", "steps"), [(0.03, 1), (0.01, 8), (0.007, 18), (0.003, 109), (0.001, 998), (0.0003, 11109)]
)
def test_interval_by_error(error, steps):
    assert update_interval(-5, -5.0, error, QuantizeConfig(steps_per_epoch=20_000))[0] == steps
    assert update_interval(-5, -5.0, error, QuantizeConfig(steps_per_epoch=100))[0] == min(steps, 100)


@pytest.mark.parametrize(
    ("distance", "steps"), [(105, 1), (1, 1), (0.5, 3), (0.1, 23), (0.05, 48), (0.02, 123), (0.01, 248)]
)
def test_interval_by_distance(distance, steps):
    for sign in (1, -1):
        assert update_interval(-5, -5 + sign * distance, 0.0, QuantizeConfig())[0] == steps
        assert update_interval(-5, -5 + sign * distance, 1e-9, QuantizeConfig(steps_per_epoch=10))[0] == min(steps, 10)


def test_interval_takes_the_greater_demand_and_never_leaves_the_epoch():
    config = QuantizeConfig(steps_per_epoch=500)
    assert update_interval(0, 0.02, 0.01, config)[0] == 8
    assert update_interval(0, 0.1, 0.003, config)[0] == 23
    assert update_interval(0, 0.0, 0.0, config)[0] == 500
    assert update_interval(0, 0.0, 1e-200, config)[0] == 500
    assert update_interval(0, 0.0, 1e-155, config)[0] == 500
    assert update_interval(0, 0.0, 1.0, config)[0] == 1
    assert update_interval(0, 0.0, 0.0, QuantizeConfig(steps_per_epoch=1))[0] == 1
    assert update_interval(0, 0.1, 0.003, config)[1] == "range moves"
    assert update_interval(0, 0.02, 0.01, config)[1] == "coarse format"


@pytest.mark.parametrize("absolute", [1.0, 0.999999, 127 / 64, 1.9921875, 2.0, 3.7e-30])
@pytest.mark.parametrize("bits", [8, 16, 31])
def test_position_rule_on_an_update(absolute, bits):
    x = torch.tensor([absolute, -absolute / 3])
    quantizer = trained(QuantizeConfig(bitwidth=bits, mode="fixed_width"), [x])
    assert quantizer.state.position == math.floor(math.log2(x.abs().max().item())) - (bits - 2)
    result = quantizer(x, training=True)
    assert (result.bits, result.position, result.finite) == (bits, quantizer.state.position, True)
    assert torch.equal(result.values, kernels.reference.quantize(x, bits, result.position))


def test_width_loop_takes_the_average_along():
    quantizer = trained(QuantizeConfig(), [gaussian()])
    assert quantizer.state.bits == 8
    for x, bits, position in ((TAIL_16, 16, 9 - 14), (TAIL_31, 31, 18 - 29)):
        before = quantizer.state
        wider_by, average = bits - before.bits, before.moving_position
        quantizer(x, training=True)
        assert (quantizer.state.bits, quantizer.state.position) == (bits, position)
        assert quantizer.state.moving_position == pytest.approx(0.04 * position + 0.96 * (average - wider_by))
        assert not quantizer.state.exceeds_max_bitwidth


def test_width_goes_from_8_to_31_in_one_update():
    state = trained(QuantizeConfig(), [TAIL_31]).state
    assert (state.bits, state.position, state.updates) == (31, 18 - 29, 1)
    assert state.moving_position == pytest.approx(0.04 * -11 + 0.96 * (100 - 23))


@pytest.mark.parametrize("largest", [8, 16])
def test_largest_width_is_kept_and_reported(largest):
    quantizer = trained(QuantizeConfig(max_bitwidth=largest), [TAIL_31])
    assert (quantizer.state.bits, quantizer.state.exceeds_max_bitwidth) == (largest, True)
    assert quantizer.state.error == pytest.approx(plain_error(TAIL_31, largest, "mean"), rel=1e-6)
    quantizer(torch.ones(4), training=True)
    assert (quantizer.state.bits, quantizer.state.exceeds_max_bitwidth) == (largest, False)


def test_width_never_falls():
    state = trained(QuantizeConfig(online=True), [TAIL_16] + [torch.ones(16)] * 20).state
    assert (state.bits, state.updates) == (16, 21)


@pytest.mark.parametrize(("product", "bits"), [("convolution", 8), ("matmul", 16)])
def test_threshold_goes_by_product(product, bits):
    x = torch.cat([torch.full((1000,), 1.012), torch.tensor([64.0])])
    error = plain_error(x, 8, "mean")
    assert 0.01 < error < 0.03
    assert trained(QuantizeConfig(), [x], product).state.bits == bits


def test_l1_measure_decides():
    x = laplace(1 << 14)
    assert trained(QuantizeConfig(), [x]).state.bits == 8
    assert trained(QuantizeConfig(error_measure="l1"), [x]).state.bits == 16


def test_state_is_plain():
    quantizer = trained(QuantizeConfig(rounding="stochastic"), [gaussian(), gaussian(seed=1)])
    state = quantizer.state_dict()
    assert set(state) == {field.name for field in dataclasses.fields(OperandState)}
    assert all(type(value) in (int, float, bool) for value in state.values())
    other = OperandQuantizer(QuantizeConfig(rounding="stochastic"), "convolution", "other")
    other.load_state_dict(state)
    assert other.state == quantizer.state
    assert other.state is not quantizer.state
    fresh = OperandQuantizer(QuantizeConfig(), "convolution", "other").state_dict()
    other.load_state_dict(fresh)
    assert other.state.position is None
    for step in range(5):
        x = gaussian(seed=step)
        quantizer.load_state_dict(fresh if step == 0 else quantizer.state_dict())
        ours, theirs = quantizer(x, training=True), other(x, training=True)
        assert torch.equal(ours.values, theirs.values)
    assert other.state == quantizer.state


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 9},
        {"bits": 8.0},
        {"bits": True},
        {"bits": None},
        {"position": "3"},
        {"position": 2.5},
        {"position": 128},
        {"position": -129},
        {"step": None},
        {"step": 1.5},
        {"step": -1},
        {"moving_position": None},
        {"moving_position": math.nan},
        {"error": [0.0]},
        {"updates": "many"},
        {"extra": 1},
    ],
)
def test_bad_states_are_refused_by_name(change):
    quantizer = trained(QuantizeConfig(), [gaussian()])
    before = dataclasses.replace(quantizer.state)
    with pytest.raises(ValueError, match="input of 'layer'"):
        quantizer.load_state_dict({**quantizer.state_dict(), **change})
    assert quantizer.state == before


@pytest.mark.parametrize("state", [None, [], "state", 3, {}, {"bits": 8}])
def test_no_states_are_refused_by_name(state):
    with pytest.raises(ValueError, match="input of 'layer'"):
        trained(QuantizeConfig(), []).load_state_dict(state)


def test_dequantized_result_is_near_the_tensor():
    x = gaussian()
    result = trained(QuantizeConfig(), [])(x, training=True)
    assert (dequantize(result) - x).abs().max() <= 2.0 ** (result.position - 1) * (1 + 1e-6)
