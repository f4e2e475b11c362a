import json
import math

import pytest
import torch

from cnmix import kernels
from cnmix.kernels import native
from cnmix.telemetry.statistics import SAMPLE_SIZE, StepSample, measure_values


def quantize(x, bits=8):
    return kernels.quantize_measured(x, bits, None)[0]


def measured(x, bits=8):
    quantized = quantize(x, bits)
    return measure_values(x, quantized, quantized.position)


def plain_snr(x, bits):
    quantized = quantize(x, bits)
    x = x.double()
    error = x - quantized.values.double() * 2.0**quantized.position
    return 10 * math.log10(x.square().sum() / error.square().sum())


@pytest.mark.parametrize("bits", [8, 16, 31])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e30])
def test_signal_to_noise_of_any_magnitude(bits, scale):
    x = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)) * scale
    x[::2] *= 1e-4  # else 31 bits lose nothing
    snr = measured(x, bits)["snr"]
    assert snr == pytest.approx(plain_snr(x, bits), abs=1e-3)


def test_signal_to_noise_of_a_sample():
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    x[:, ::64] = 0  # a distance that meets the same columns would see these alone, or none of them
    found = measured(x)
    snr, histogram = found["snr"], found["histogram"]
    assert found["underflow"] == pytest.approx(kernels.shares(x, quantize(x)).underflow, abs=0.02)
    assert snr == pytest.approx(plain_snr(x, 8), abs=0.3)
    taken = sum(histogram["counts"]) + histogram["zeros"]
    assert 0.9 * SAMPLE_SIZE < taken <= SAMPLE_SIZE
    assert histogram["zeros"] / taken == pytest.approx(1 / 64, abs=0.02)


def test_nothing_lost_and_nothing_there():
    exact, zeros = torch.tensor([1.0, -2.0, 0.5]), torch.zeros(3, 4)
    first, second = measured(exact), measured(zeros)
    histogram, empty = first["histogram"], second["histogram"]
    assert first["snr"] is second["snr"] is None
    assert first["underflow"] == second["underflow"] == 0
    assert histogram == {"first": -1, "counts": [1, 1, 1], "zeros": 0}
    assert empty == {"first": None, "counts": [], "zeros": 12}


def test_histogram_counts_exponents():
    x = torch.tensor([[1.0, 1.99, -2.0], [0.0, -0.0, 2.0**-126], [3e38, 0.26, 1e-40]])
    histogram = measured(x, 16)["histogram"]
    counts = dict(enumerate(histogram["counts"], histogram["first"]))
    assert {exponent: count for exponent, count in counts.items() if count} == {-126: 1, -2: 1, 0: 2, 1: 1, 127: 1}
    assert histogram["zeros"] == 3  # with the subnormal
    assert {min(counts), max(counts)} == {-126, 127}


@pytest.mark.parametrize("order", [(0, 2, 3, 1), (3, 2, 1, 0), (0, 1, 2, 3)])
def test_layout_does_not_matter(order):
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    moved = x.permute(order).contiguous().permute([order.index(dim) for dim in range(4)])
    quantized = quantize(x)
    each = ((moved, quantized), (x, quantize(moved)), (x[:, ::2], quantize(x[:, ::2])))
    a, b, part = (measure_values(a, b, b.position) for a, b in each)
    first, second, part = a["snr"], b["snr"], part["snr"]
    assert first == pytest.approx(second) == pytest.approx(plain_snr(x, 8))
    assert a["histogram"] == b["histogram"]
    assert part == pytest.approx(plain_snr(x[:, ::2], 8))


def test_without_the_compiled_part(monkeypatch):
    x = torch.randn(3, 7001, generator=torch.Generator().manual_seed(0)) * 0.005
    x[0, ::5] = 0
    x[1, 0] = 2.0
    found = [measured(x, bits) for bits in (8, 16, 31)]
    monkeypatch.setattr(native, "library", lambda: None)
    for bits, each in zip((8, 16, 31), found, strict=True):
        other = measured(x, bits)
        assert other.pop("snr") == pytest.approx(each.pop("snr"), rel=1e-9, nan_ok=True)
        assert other == each
        assert each["underflow"] > 0.5 or bits > 8


def test_expanded_tensors():
    assert measured(torch.tensor(0.3).expand(50, 40))["histogram"] == {"first": -2, "counts": [2000], "zeros": 0}


def test_half_types():
    x = torch.randn(20, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert measured(x)["snr"] == pytest.approx(plain_snr(x, 8))


def test_time_adds_up_without_what_looking_took():
    sample = StepSample()
    for work, seconds in (("quantize", 1.0), ("product", 2.0), ("quantize", 0.5), ("look", 4.0), ("adapt", 0.25)):
        sample.spent(work, seconds)
    split = sample.split(10.0)
    assert split == {"seconds": 6.0, "quantize": 1.5, "product": 2.0, "adapt": 0.25, "other": 2.25}
    sample.multiplied((16, 8), 5, (1, 1))
    sample.multiplied((8, 16), 6, (1, 1))
    sample.multiplied((31, 31), 7, (1, 1))
    assert sample.macs == {"8x16": 11, "31x31": 7}


def test_shares_of_any_layout_and_limits():
    x = torch.cat([torch.full((5,), -128.0), torch.arange(-3, 4), torch.full((2,), 300.0)]).view(2, 7).t()
    quantized = kernels.quantize_measured(x, 8, 0)[0]
    assert kernels.shares(x, quantized) == (7 / 14, 0.0)
    tiny = torch.tensor([0.2, 0.0, -0.3, 5.0])
    assert kernels.shares(tiny, kernels.quantize_measured(tiny, 8, 0)[0]) == (0.0, 0.5)


@pytest.mark.parametrize("largest", [1e25, 3e38])
def test_values_far_beyond_a_format_that_no_longer_fits_them(largest):
    x = torch.full((64,), largest)
    x[:32] = 1.0
    found = measure_values(x, kernels.quantize_measured(x, 8, 0)[0], 0)
    assert found["snr"] == pytest.approx(0, abs=1e-6)  # all that counts is lost
    assert found["underflow"] == 0
    json.dumps(found, allow_nan=False)
