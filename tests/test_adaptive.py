import dataclasses
import logging
import math

import pytest
import torch

from cnmix import QuantizeConfig, kernels
from cnmix.adaptive import OperandQuantizer, OperandState, quantization_error, update_interval
from cnmix.fixed_point import FixedPoint, absmax, choose_position, dequantize


def gaussian(n=1024, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def laplace(n, seed=0):
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    return (-uniform.sign() * torch.log1p(-2 * uniform.abs())).float()


def log_normal(n, sigma, seed=0):
    return torch.exp(sigma * gaussian(n, seed).double()).float()


def student_t(n, freedom, seed=0):
    g = torch.randn(freedom + 1, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (g[0] / (g[1:] ** 2).mean(0).sqrt()).float()


def mostly_zero(n, seed=0):
    keep = torch.rand(n, generator=torch.Generator().manual_seed(seed + 1)) < 0.1
    return gaussian(n, seed) * keep


def quantize(x, bits):
    position = choose_position(absmax(x), bits)
    return FixedPoint(kernels.quantize(x, bits, position), bits, position)


def plain_error(x, bits, measure):
    """The equations of the algorithm, in float64."""
    x = x.double()
    step = 2.0 ** (math.floor(math.log2(x.abs().max().item())) - (bits - 2))
    xq = (x / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
    mean = x.abs().mean()
    difference = (x - xq).abs().mean() if measure == "l1" else (mean - xq.abs().mean()).abs()
    return torch.log2(difference / mean + 1).item()


def trained(config, tensors, product="convolution"):
    quantizer = OperandQuantizer(config, product, "input of 'layer'")
    for x in tensors:
        quantizer(x, training=True)
    return quantizer


TAIL_16 = torch.cat([gaussian(1 << 14), torch.tensor([600.0])])
TAIL_31 = torch.cat([gaussian(1 << 14), torch.tensor([2.0**18])])
SAMPLES = {
    "gaussian": gaussian(5000),
    "laplace": laplace(5000),
    "log-normal": log_normal(5000, 2.0),
    "mostly zero": mostly_zero(5000),
    "tiny": gaussian(5000) * 1e-30,
    "one value": torch.full((3, 5), -1.7),
    "transposed": gaussian(6000).view(60, 100).t(),
}


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
    assert update_interval(-5, -5.0, error, QuantizeConfig(steps_per_epoch=20_000)) == steps
    assert update_interval(-5, -5.0, error, QuantizeConfig(steps_per_epoch=100)) == min(steps, 100)


@pytest.mark.parametrize(
    ("distance", "steps"), [(105, 1), (1, 1), (0.5, 3), (0.1, 23), (0.05, 48), (0.02, 123), (0.01, 248)]
)
def test_interval_by_distance(distance, steps):
    for sign in (1, -1):
        assert update_interval(-5, -5 + sign * distance, 0.0, QuantizeConfig()) == steps
        assert update_interval(-5, -5 + sign * distance, 1e-9, QuantizeConfig(steps_per_epoch=10)) == min(steps, 10)


def test_interval_takes_the_greater_demand_and_never_leaves_the_epoch():
    config = QuantizeConfig(steps_per_epoch=500)
    assert update_interval(0, 0.02, 0.01, config) == 8
    assert update_interval(0, 0.1, 0.003, config) == 23
    assert update_interval(0, 0.0, 0.0, config) == 500
    assert update_interval(0, 0.0, 1e-200, config) == 500
    assert update_interval(0, 0.0, 1e-155, config) == 500
    assert update_interval(0, 0.0, 1.0, config) == 1
    assert update_interval(0, 0.0, 0.0, QuantizeConfig(steps_per_epoch=1)) == 1


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


def test_fixed_width_only_adapts_the_interval():
    quantizer = trained(QuantizeConfig(mode="fixed_width"), [TAIL_31])
    assert (quantizer.state.bits, quantizer.state.position, quantizer.state.exceeds_max_bitwidth) == (8, 18 - 6, True)
    assert trained(QuantizeConfig(mode="fixed_width", bitwidth=16), [torch.ones(3)]).state.bits == 16


def test_fixed_interval_only_adapts_the_width():
    config = QuantizeConfig(mode="fixed_interval", interval=7, steps_per_epoch=5, quantify_rate=1.0)
    assert update_steps(config, [torch.ones(3)] * 22) == [0, 7, 14, 21]
    assert trained(config, [TAIL_16]).state.bits == 16


def update_steps(config, tensors):
    quantizer, steps = OperandQuantizer(config, "convolution", "x"), []
    for step, x in enumerate(tensors):
        before, due = quantizer.state.updates, quantizer.due
        quantizer(x, training=True)
        assert quantizer.state.step == step + 1
        if quantizer.state.updates > before:
            assert due
            assert quantizer.state.last_update == step
            assert quantizer.state.next_update == step + quantizer.state.interval
            steps.append(step)
    return steps


def test_schedule_follows_the_interval_then_the_epoch():
    # Moving average and error are at rest: the interval after the first phase is the whole epoch, cut at its end.
    config = QuantizeConfig(steps_per_epoch=20, quantify_rate=0.25, alpha=0.3)
    tensors = [torch.ones(4)] * 90
    assert update_steps(config, tensors)[:6] == [0, 1, 2, 3, 4, 5]
    assert [step for step in update_steps(config, tensors) if step >= 20] == [20, 40, 60, 80]
    assert update_steps(config.replace(quantify_rate=0.0), tensors)[:2] == [0, 1]
    assert update_steps(config.replace(quantify_rate=1.0), tensors) == [*range(20), 20, 40, 60, 80]
    assert update_steps(config.replace(online=True), tensors) == list(range(90))
    assert update_steps(config.replace(steps_per_epoch=1), tensors[:9]) == list(range(9))


@pytest.mark.parametrize("sample", ["gaussian", "laplace", "zeros between"])
def test_schedule_and_average_are_those_of_a_step_by_step_simulation(sample):
    config = QuantizeConfig(steps_per_epoch=300, quantify_rate=0.05, alpha=0.2)
    torch.manual_seed(0)
    tensors = [(laplace if sample == "laplace" else gaussian)(300, step) * (1 + step / 100) for step in range(700)]
    if sample == "zeros between":
        for step in (0, 1, 14, 15, 40, 41, 300, 301, 450):
            tensors[step] = torch.zeros(300)
    quantizer = OperandQuantizer(config, "convolution", "x")
    average, position, due_at, updates = 100.0, None, 0, 0
    for step, x in enumerate(tensors):
        quantizer(x, training=True)
        if step >= due_at and x.any():
            position = math.floor(math.log2(x.abs().max().item())) - 6
            error = plain_error(x, 8, "mean")
            wait = 0.1 / max(0.2 * abs(position - average), 100 * error**2) - 2
            if step < 15:
                wait = 1
            elif step >= 300:
                wait = 300 - step % 300
            else:
                wait = min(max(round(wait), 1), 300 - step)
            due_at, updates = step + wait, updates + 1
        if position is not None:
            average = 0.2 * position + 0.8 * average
        state = quantizer.state
        assert (state.position, state.next_update, state.updates, state.bits) == (position, due_at, updates, 8)
        if state.last_update == step and position is not None:
            assert state.moving_position == pytest.approx(average, rel=1e-9)
    assert 17 < updates < 250


def test_reuse_steps_keep_the_format_and_saturate():
    config = QuantizeConfig(mode="fixed_interval", interval=100)
    quantizer = trained(config, [torch.tensor([1.0, -1.0])])
    result = quantizer(torch.tensor([1.0, 50.0, -50.0, 1e38]), training=True)
    assert result.values.tolist() == [64, 127, -128, 127]
    assert result.position == -6


def test_a_repeated_step_counts_like_a_measured_one():
    config = QuantizeConfig(steps_per_epoch=60, quantify_rate=0.1, alpha=0.3)
    x = gaussian(400)
    repeated, measured = trained(config, [x]), trained(config, [x])
    for _ in range(150):
        repeated.repeat()
        measured(x, training=True)
        assert repeated.state == measured.state


@pytest.mark.parametrize("fill", [0.0, math.nan, math.inf, -math.inf])
def test_tensors_that_say_nothing_move_nothing_but_the_step(fill):
    x = gaussian(64)
    bad = torch.zeros(64) if fill == 0 else torch.cat([x[:-1], torch.tensor([fill])])
    fresh = trained(QuantizeConfig(), [bad, bad])
    assert fresh.state == OperandState(bits=8, step=2)
    quantizer = trained(QuantizeConfig(online=True), [x])
    before = dataclasses.replace(quantizer.state)
    result = quantizer(bad, training=True)
    assert quantizer.state == dataclasses.replace(before, step=2)
    assert result.finite == (fill == 0)
    assert not result.values.any()
    assert quantizer(x, training=True).finite
    assert (quantizer.state.updates, quantizer.state.last_update) == (2, 2)


def test_nonfinite_is_reported_once_by_name(caplog):
    quantizer = OperandQuantizer(QuantizeConfig(), "matmul", "grad_output of 'encoder.fc1'")
    with caplog.at_level(logging.WARNING, logger="cnmix"):
        for x in (torch.tensor([math.nan]), torch.tensor([math.inf]), torch.tensor([-math.inf, 1])):
            result = quantizer(x, training=True)
        assert [record.getMessage() for record in caplog.records] == [
            "NaN or infinity in grad_output of 'encoder.fc1': the products with it are NaN"
        ]
        other = quantizer(torch.ones(1), training=True)
        assert kernels.matmul(*(v._replace(values=v.values[:1, None]) for v in (result, other))).isnan().all()
        quantizer(torch.tensor([math.nan]), training=True)
    assert len(caplog.records) == 2


@pytest.mark.parametrize("updates", [0, 1])
def test_outside_training_nothing_changes(updates):
    quantizer = trained(QuantizeConfig(online=True, bitwidth=16), [torch.tensor([1.0, 0.3])] * updates)
    before = dataclasses.replace(quantizer.state)
    x = torch.tensor([4.0, -0.1, 100.0])
    result = quantizer(x, training=False)
    position = -14 if updates else 6 - 14
    assert (result.bits, result.position) == (16, position)
    assert torch.equal(result.values, kernels.reference.quantize(x, 16, position))
    for other in (torch.zeros(3), torch.tensor([math.nan]), torch.zeros(0), TAIL_31):
        quantizer(other, training=False)
    assert quantizer.state == before


def test_statistics_do_not_depend_on_threads():
    samples = [log_normal(n, 1.0) for n in (3, 4096, 40_001, 1_100_000)]
    samples += [log_normal(600_000, 1.0).view(600, 1000).t(), log_normal(99_999, 1.0).bfloat16()]
    states = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            configs = [QuantizeConfig(error_measure=measure) for measure in ("mean", "l1")]
            states.append([trained(config, [x, x]).state for config in configs for x in samples])
    finally:
        torch.set_num_threads(threads)
    assert states[0] == states[1]


def test_stochastic_rounding():
    config, x = QuantizeConfig(rounding="stochastic", online=True), gaussian(4096)
    quantizer, same = (OperandQuantizer(config, "convolution", "x", seed=5) for _ in range(2))
    other = OperandQuantizer(config, "convolution", "x", seed=6)
    steps = [quantizer(x, training=True).values for _ in range(3)]
    assert all(torch.equal(values, same(x, training=True).values) for values in steps)
    assert not torch.equal(steps[0], steps[1])
    assert not torch.equal(steps[1], steps[2])
    assert not torch.equal(steps[0], other(x, training=True).values)
    assert quantizer.state.error == pytest.approx(plain_error(x, 8, "mean"), rel=1e-6)
    nearest = kernels.reference.quantize(x, 8, quantizer.state.position)
    assert ((steps[0] - nearest).abs() <= 1).all()
    assert all(torch.equal(quantizer(x, training=False).values, nearest) for _ in range(2))


@pytest.mark.parametrize("rounding", ["nearest_even", "half_up", "half_away"])
def test_configured_rounding_serves_training_and_evaluation(rounding):
    x = torch.tensor([0.5, 1.5, -0.5, -1.5, 64.0])
    quantizer = OperandQuantizer(QuantizeConfig(rounding=rounding), "convolution", "x")
    expected = kernels.reference.quantize(x, 8, 0, rounding)
    assert torch.equal(quantizer(x, training=True).values, expected)
    assert torch.equal(quantizer(x, training=False).values, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_count_by_value(dtype):
    x = gaussian(500).to(dtype)
    ours, theirs = (OperandQuantizer(QuantizeConfig(), "convolution", "x") for _ in range(2))
    assert torch.equal(ours(x, training=True).values, theirs(x.float(), training=True).values)
    assert ours.state.error == pytest.approx(theirs.state.error, rel=1e-6, abs=1e-9)
