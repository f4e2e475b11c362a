import math

import pytest
import torch

from cnmix.torch_mlu.core import mlu_quantize
from cnmix.torch_mlu.core.quantized.observer import MLUMinMaxObserver, MLUPerChannelMinMaxObserver


@pytest.mark.parametrize(("bits", "qmax"), [(8, 127), (16, 32767)])
def test_scale_is_qmax_over_the_widest_bounds(bits, qmax):
    observer = MLUMinMaxObserver(bits)
    for values in ([-3.0, 1.0], [0.5, 2.0], [-1.0, 2.5]):
        observer(torch.tensor(values))
    assert observer.calculate_scale().tolist() == [torch.tensor(qmax / 3.0).item()]
    assert (observer.min_val, observer.max_val) == (-3.0, 2.5)


def test_the_average_weighs_the_first_call_most():
    observer = MLUMinMaxObserver(use_avg=True)
    for top in (1.0, 4.0, 10.0):
        observer(torch.tensor([0.0, top]))
    # the n-th call counts as the n + 1-th: (1 * 2 + 4) / 3, then (that * 3 + 10) / 4
    assert observer.max_val == (2.0 * 3 + 10) / 4


def test_bounds_are_scaled():
    observer = MLUMinMaxObserver(data_scale=0.5)
    observer(torch.tensor([-8.0, 1.0]))
    assert observer.calculate_scale().item() == 127 / 4


def test_calls_past_the_cap_are_ignored_and_say_so(capsys):
    observer = MLUMinMaxObserver(iteration=2)
    for top in (1.0, 2.0, 64.0, 64.0):
        observer(torch.tensor([top]))
    assert observer.calculate_scale().item() == 127 / 2
    assert capsys.readouterr().out.count("[warning] It seems that evaluation reaches maxium img_num") == 1


def test_zeros_have_the_scale_one():
    observer = MLUMinMaxObserver()
    observer(torch.zeros(3))
    assert observer.calculate_scale().tolist() == [1.0]


def test_what_was_not_seen_or_is_not_finite_has_the_scale_one_and_a_warning():
    observer = MLUMinMaxObserver()
    with pytest.warns(UserWarning, match="not observed"):
        assert observer.calculate_scale().tolist() == [1.0]
    observer(torch.tensor([math.nan, 1.0]))
    with pytest.warns(UserWarning, match="not finite"):
        assert observer.calculate_scale().tolist() == [1.0]


def test_an_empty_batch_is_not_seen():
    observer = MLUMinMaxObserver(iteration=1)
    observer(torch.empty(0, 3))
    observer(torch.ones(1, 3))
    assert observer.calculate_scale().item() == 127


def test_each_channel_has_its_own():
    observer = MLUPerChannelMinMaxObserver(data_scale=2.0)
    observer(torch.tensor([[[1.0, -4.0]], [[0.0, 0.0]], [[2.0, 1.0]]]))
    assert observer.calculate_scale().tolist() == [127 / 8, 1.0, 127 / 4]


def test_squares():
    lrn, norm = mlu_quantize.MLULrnObserver(), mlu_quantize.MLUNormObserver()
    for observer in (lrn, norm):
        observer(torch.tensor([-4.0, 2.0]))
    assert lrn.calculate_scale().tolist() == [127 / 16]
    assert norm.calculate_scale().tolist() == [127 / 4, 127 / 16]


def test_half_and_card_tensors_are_observed():
    observer = MLUMinMaxObserver()
    observer(torch.tensor([-4.0, 2.0]).half().to("mlu"))
    assert observer.calculate_scale().tolist() == [127 / 4]
    assert mlu_quantize.mlu_activation_observer_dict == {"minmax": MLUMinMaxObserver}
