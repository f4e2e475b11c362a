import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnmix.fixed_point import BITS, ROUNDINGS, FixedPoint
from cnmix.kernels import cpu, native, quantization, reference

library = native.library()
pytestmark = pytest.mark.skipif(library is None, reason=native.describe())

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(
    values=st.lists(FLOATS, max_size=80),
    bits=st.sampled_from(BITS),
    position=st.integers(-128, 127),
    rounding=st.sampled_from(ROUNDINGS),
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**63 - 1),
)
@settings(max_examples=150, deadline=None)
def test_every_instruction_set_quantizes_alike(instructions, values, bits, position, rounding, seed, stream):
    x = torch.tensor(values, dtype=torch.float32)
    key = {"seed": seed, "stream": stream}
    expected = reference.quantize(x, bits, position, rounding, **key)
    assert torch.equal(quantization.quantize(x, bits, position, rounding, **key), expected)


@pytest.mark.parametrize("bits", BITS)
def test_long_tensors_and_statistics(instructions, bits):
    x = torch.randn(3, 50_001, generator=torch.Generator().manual_seed(bits)) * 3
    operand, found = quantization.quantize_measured(x, bits, None, measure=True)
    assert torch.equal(operand.values, reference.quantize(x, bits, operand.position))
    assert found.absmax == x.abs().max().item()
    assert found.sum_q == operand.values.to(torch.int64).abs().sum().item()
    assert found.sum_x == pytest.approx(x.double().abs().sum().item(), rel=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 17, 4095, 99_999])
def test_non_finite_values_are_found_anywhere(instructions, value, place):
    x = torch.randn(100_000)
    x[place] = value
    for position in (None, -5):
        operand, _ = quantization.quantize_measured(x, 8, position)
        assert not operand.finite
        assert not operand.values.any()


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_threads_do_not_change_bits(rounding):
    x = torch.randn(300_001)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        operand, found = quantization.quantize_measured(x, 8, None, rounding, seed=3, stream=5, measure=True)
        results.append((operand.values, found))
    torch.set_num_threads(2)
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize(("a_bits", "b_bits"), [(16, 16), (16, 8), (8, 16)])
@pytest.mark.parametrize("values", ["random", "low", "high"])
@pytest.mark.parametrize(("a_transposed", "b_transposed"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("bias", [False, True])
def test_digits_equal_the_reference(a_bits, b_bits, values, a_transposed, b_transposed, bias):
    m, k, n = 70, 301, 65
    generator = torch.Generator().manual_seed(a_bits + b_bits)

    def operand(rows, columns, bits, transposed):
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        shape = (columns, rows) if transposed else (rows, columns)
        if values == "random":
            integers = torch.randint(low, high + 1, shape, generator=generator)
        else:
            integers = torch.full(shape, low if values == "low" else high)
        integers = integers.to(torch.int8 if bits == 8 else torch.int16)
        return FixedPoint(integers.t() if transposed else integers, bits, -3)

    a, b = operand(m, k, a_bits, a_transposed), operand(k, n, b_bits, b_transposed)
    added = torch.randn(n, generator=generator) if bias else None
    expected = reference.matmul(a, b)
    assert torch.equal(cpu.matmul(a, b, bias=added), expected + added if bias else expected)


def test_switched_off_by_the_environment():
    code = "from cnmix.kernels import native; print(native.library(), native.describe())"
    environment = {**os.environ, "CNMIX_NATIVE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("None torch alone: CNMIX_NATIVE=0")


@pytest.mark.parametrize("setting", ["OMP_THREAD_LIMIT=1", "OMP_DYNAMIC=TRUE"])
def test_fewer_threads_than_asked_for(setting):
    code = """
import torch
torch.set_num_threads(2)
from cnmix.kernels import checksum, quantize, reference
x = torch.randn(1 << 20)
assert torch.equal(quantize(x, 8, -5), reference.quantize(x, 8, -5))
"""
    name, value = setting.split("=")
    subprocess.run([sys.executable, "-c", code], env={**os.environ, name: value}, check=True)


def test_checksum_equals_the_one_without_the_compiled_part(monkeypatch, instructions):
    x = torch.randn(300_007)
    expected = quantization.checksum(x)
    assert quantization.checksum(x.flip(0)) != expected
    changed = x.clone()
    changed[5] = -changed[5]
    changed[6] = -changed[6]
    assert quantization.checksum(changed) != expected
    monkeypatch.setattr(native, "library", lambda: None)
    assert quantization.checksum(x) == expected


def test_a_library_of_another_version_is_refused(monkeypatch):
    native.library.cache_clear()
    monkeypatch.setattr(native, "_ABI", -1)
    assert native.library() is None
    assert "of another version or system" in native.describe()
    native.library.cache_clear()
