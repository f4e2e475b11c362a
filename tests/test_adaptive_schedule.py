import dataclasses
import logging
import math

import pytest
import torch
from adaptive_samples import TAIL_16, TAIL_31, gaussian, laplace, log_normal, plain_error, trained

from cnmix import QuantizeConfig, kernels
from cnmix.adaptive import OperandQuantizer
from cnmix.operand import OperandState


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
    integers = measured(x, training=False)
    for _ in range(150):
        repeated.repeat(integers)
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
            "NaN or infinity in grad_output of 'encoder.fc1' (training step 0): the products with it are NaN"
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


def test_saturation_brings_the_next_update_forward():
    config = QuantizeConfig(mode="fixed_interval", interval=50, saturation=0.01, max_bitwidth=8)
    quantizer = OperandQuantizer(config, "matmul", "input of 'layer'")
    x = gaussian(1000)
    quantizer(x, training=True)
    position = quantizer.state.position
    few = x.clone()
    few[:5] = 1000.0  # half a percent in each of these steps
    for _ in range(3):
        quantizer(few, training=True)
    assert quantizer.state.updates == 1
    assert quantizer.state.saturation == pytest.approx(0.015)
    many = x.clone()
    many[:100] = 1000.0
    quantizer(many, training=False)
    assert quantizer.state.next_update == 50
    quantizer(many, training=True)  # 11.5 percent over four steps
    assert quantizer.state.next_update == 5
    quantizer(many, training=True)
    assert quantizer.state.updates == 2
    assert quantizer.state.position > position
    assert quantizer.state.saturation == 0
    without = OperandQuantizer(config.replace(saturation=None), "matmul", "input of 'layer'")
    for tensor in (x, few, few, few, many, many):
        without(tensor, training=True)
    assert without.state.updates == 1


def test_widths_fall_again_where_the_narrower_error_is_well_under_the_threshold():
    settings = {"mode": "fixed_interval", "interval": 1, "threshold": 0.02}
    falling = OperandQuantizer(QuantizeConfig(narrowing=0.5, **settings), "matmul", "input of 'layer'")
    original = OperandQuantizer(QuantizeConfig(**settings), "matmul", "input of 'layer'")
    for quantizer in (falling, original):
        quantizer(TAIL_31, training=True)
        assert quantizer.state.bits == 31
    widths = []
    for _ in range(3):
        quantized = falling(gaussian(1024), training=True)
        widths.append(quantized.bits)
        assert quantized.values.dtype == {8: torch.int8, 16: torch.int16}[quantized.bits]
        assert (falling.state.bits, falling.state.position) == (quantized.bits, quantized.position)
        original(gaussian(1024), training=True)
    assert widths == [16, 8, 8]  # one width at a time, and not below bitwidth
    assert original.state.bits == 31
    falling(TAIL_31, training=True)
    assert falling.state.bits == 31

    # Between half the threshold and the threshold nothing changes: that is the hysteresis.
    x = gaussian(1024)
    x[0] = 60.0
    at_int8 = trained(QuantizeConfig(max_bitwidth=8), [x]).state.error
    settings["threshold"] = 1.5 * at_int8
    narrow = OperandQuantizer(QuantizeConfig(narrowing=0.5, **settings), "matmul", "input of 'layer'")
    wide = OperandQuantizer(QuantizeConfig(narrowing=0.5, **settings), "matmul", "input of 'layer'")
    wide(TAIL_31, training=True)
    for _ in range(4):
        narrow(x, training=True)
        wide(x, training=True)
    assert (narrow.state.bits, wide.state.bits) == (8, 16)
    floor = OperandQuantizer(QuantizeConfig(bitwidth=16, narrowing=0.9, **settings), "matmul", "input of 'layer'")
    floor(gaussian(1024), training=True)
    assert floor.state.bits == 16
