"""What quantizers tell of their update steps."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

import cnmix
from cnmix import QuantizeConfig
from cnmix.adaptive import OperandQuantizer
from cnmix.operand import Observation, Rounds


class Kept:
    def __init__(self):
        self.decisions, self.nonfinite = [], []

    def decided(self, quantizer, decision):
        self.decisions.append(decision)

    def met_nonfinite(self, quantizer):
        self.nonfinite.append(quantizer.state.step - 1)

    def looked(self, quantizer, x, quantized, absmax):
        raise AssertionError


def quantizer_of(product="matmul", **settings):
    quantizer = OperandQuantizer(QuantizeConfig(**settings), product, "input of 'fc'")
    quantizer.listener = Kept()
    return quantizer, quantizer.listener


def steady(steps):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(64, generator=generator) + 0.5 for _ in range(steps)]


def reasons(tensors, **settings):
    quantizer, kept = quantizer_of(**settings)
    for x in tensors:
        quantizer(x, training=True)
    return [(each.step, each.reason) for each in kept.decisions], kept.decisions


def test_schedule_of_an_epoch_has_its_reasons():
    found, decisions = reasons(steady(700), steps_per_epoch=300, quantify_rate=0.02)
    by_step = dict(found)
    assert [by_step[step] for step in range(6)] == ["first"] + ["first share of the epoch"] * 5
    assert {by_step[step] for step in by_step if 6 <= step < 300} == {"interval ended"}
    assert [step for step in by_step if step >= 300] == [300, 600]
    assert by_step[300] == by_step[600] == "new epoch"
    intervals = {each.step: (each.interval, each.interval_reason) for each in decisions}
    assert intervals[0] == (1, "first share of the epoch")
    assert intervals[6] == (1, "range moves")
    assert intervals[300] == (300, "end of the epoch")
    for each, after in itertools.pairwise(decisions):
        assert after.step == each.step + each.interval
        assert after.position[0] == each.position[1]
        assert after.bits[0] == each.bits[1]
    long = [each for each in decisions if each.interval > 1 and each.step < 300]
    assert {each.interval_reason for each in long} <= {"range moves", "coarse format", "end of the epoch"}


def test_settings_that_fix_the_schedule():
    found, decisions = reasons(steady(4), online=True)
    assert found == [(0, "first"), (1, "online"), (2, "online"), (3, "online")]
    assert {(each.interval, each.interval_reason) for each in decisions} == {(1, "online")}
    found, decisions = reasons(steady(7), mode="fixed_interval", interval=3)
    assert found == [(0, "first"), (3, "fixed interval"), (6, "fixed interval")]
    assert {(each.interval, each.interval_reason) for each in decisions} == {(3, "fixed")}


def test_what_was_due_and_could_not_be_measured():
    zeros, nan = torch.zeros(4), torch.tensor([math.nan, 1.0])
    found, _ = reasons([zeros, *steady(2), nan, *steady(1)], online=True)
    assert found == [(1, "nothing measured before"), (2, "online"), (4, "nothing measured before")]


def test_saturation_is_a_reason():
    settings = {"saturation": 0.25, "steps_per_epoch": 2, "quantify_rate": 0.0}
    quantizer, kept = quantizer_of(**settings)
    quantizer.config = quantizer.config.replace(steps_per_epoch=50)
    quantizer(torch.linspace(0.1, 1, 64), training=True)
    quantizer.state.next_update = quantizer.state.interval = 40
    for x in (torch.linspace(0.1, 1, 64), torch.full((64,), 100.0), torch.full((64,), 100.0)):
        quantizer(x, training=True)
    assert [(each.step, each.reason) for each in kept.decisions] == [(0, "first"), (3, "saturation")]


def test_outcomes_and_errors_at_every_width():
    wide = torch.cat([torch.full((1000,), 2.0**-8), torch.tensor([1.0])])
    quantizer, kept = quantizer_of()
    quantizer(wide, training=True)
    (decision,) = kept.decisions
    assert (decision.bits, decision.outcome, decision.threshold) == ((8, 16), "widened", 0.01)
    assert decision.position == (None, quantizer.state.position) == (None, -14)
    assert list(decision.errors) == [8, 16]
    assert decision.errors[8] > 0.01 >= decision.errors[16] == quantizer.state.error

    quantizer, kept = quantizer_of(max_bitwidth=8)
    quantizer(wide, training=True)
    assert [(each.bits, each.outcome) for each in kept.decisions] == [((8, 8), "over")]
    assert quantizer.state.exceeds_max_bitwidth

    quantizer, kept = quantizer_of(narrowing=0.5, online=True)
    quantizer(wide, training=True)
    quantizer(torch.full((64,), 0.5), training=True)
    assert [(each.bits, each.outcome) for each in kept.decisions] == [((8, 16), "widened"), ((16, 8), "narrowed")]
    assert set(kept.decisions[1].errors) == {8, 16}


def test_several_processes_tell_what_they_agreed_on():
    quantizer, kept = quantizer_of()
    rounds = Rounds()
    quantizer.observe(rounds)
    quantizer(torch.full((64,), 0.5), training=True)
    assert kept.decisions == []
    rounds.present = 1
    seen = Observation(absmax=0.5, sums={8: (2.0, 64.0), 16: (0.0, 64.0)}, rounds=rounds)
    quantizer.agree(1, seen, 1.0)
    (decision,) = kept.decisions
    assert (decision.step, decision.reason, decision.bits, decision.outcome) == (0, "first", (8, 16), "widened")
    assert decision.errors == {8: pytest.approx(math.log2(1 + 2 / 64)), 16: 0.0}
    assert decision.position == (None, -15)


def test_several_processes_that_had_nothing_to_measure():
    quantizer, kept = quantizer_of(steps_per_epoch=50, quantify_rate=0.0)
    rounds = Rounds()
    quantizer.observe(rounds)
    for step, absmax in enumerate((0.0, 0.5, 0.5)):
        rounds.present = step + 1
        sums = {8: (0.0, 64.0)} if absmax else {}
        quantizer.agree(step + 1, Observation(absmax=absmax, sums=sums, rounds=rounds), 1.0)
    assert [(each.step, each.reason) for each in kept.decisions] == [
        (1, "nothing measured before"),
        (2, "interval ended"),
    ]


def test_micro_batches_that_share_a_weight_tell_of_each_update():
    module = nn.Linear(4, 3)
    model, _ = cnmix.initialize(nn.Sequential(module), opt_level="O1")
    quantizer = module.quantizers.weight
    quantizer.listener = kept = Kept()
    for _ in range(2):
        model(torch.randn(2, 4))
    assert [(each.step, each.outcome) for each in kept.decisions] == [(0, "kept"), (1, "kept")]
    assert kept.decisions[0].errors == kept.decisions[1].errors == {8: quantizer.state.error}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_no_listener(duplicate):
    quantizer, kept = quantizer_of()
    copied = duplicate(quantizer)
    assert quantizer.listener is kept
    assert copied.listener is None
    assert copied.state == quantizer.state


def test_a_listener_changes_nothing():
    alone = OperandQuantizer(QuantizeConfig(steps_per_epoch=40), "matmul", "x", seed=1)
    heard, _ = quantizer_of(steps_per_epoch=40)
    heard.state.seed = 1
    for x in (*steady(60), torch.tensor([math.nan]), torch.zeros(3), *steady(5)):
        assert torch.equal(alone(x, training=True).values, heard(x, training=True).values)
    assert alone.state == heard.state


def test_nan_is_told_once_in_a_row_with_its_step(caplog):
    quantizer, kept = quantizer_of()
    nan = torch.tensor([math.nan])
    for x in (torch.ones(2), nan, nan, torch.ones(2), nan):
        quantizer(x, training=True)
    assert kept.nonfinite == [1, 4]
    assert "NaN or infinity in input of 'fc' (training step 1)" in caplog.text
    quantizer(torch.ones(2), training=True)
    quantizer(nan, training=False)
    assert "(outside training)" in caplog.text
