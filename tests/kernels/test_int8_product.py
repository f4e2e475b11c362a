import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnmix.fixed_point import FixedPoint
from cnmix.kernels import describe, matmul, reference
from cnmix.kernels.int8_product import MAX_K, _canonical, _choose_variant, _split_product, int8_matmul, serving_variant

from .strategies import FILLS, MATRIX_LAYOUTS, integers, lay_out, matrix_pairs, same_bits

real_int_mm = torch._int_mm


def exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.to(torch.int64) @ b.to(torch.int64)


def check_small_shapes() -> None:
    """Holds ``int8_matmul`` against int64 over small shapes, layouts and extremes; runs in a subprocess too."""
    sizes, depths = (1, 2, 3, 16, 17), (1, 2, 3, 17, 64, 258)
    for seed, (m, k, n) in enumerate(itertools.product(sizes, depths, sizes)):
        a, b = integers((m, k), 8, "random", seed), integers((k, n), 8, "random", seed + 1)
        for layouts in itertools.product(MATRIX_LAYOUTS, repeat=2):
            left, right = (lay_out(x, layout) for x, layout in zip((a, b), layouts, strict=True))
            assert torch.equal(int8_matmul(left, right).long(), exact(left, right)), (m, k, n, *layouts)
    for fills in itertools.product(FILLS, repeat=2):
        for m, k, n in ((1, 700, 1), (1, 256, 40), (40, 256, 1), (33, 513, 65)):
            a, b = integers((m, k), 8, fills[0], 1), integers((k, n), 8, fills[1], 2)
            assert torch.equal(int8_matmul(a, b).long(), exact(a, b)), (m, k, n, *fills)


@pytest.fixture
def fresh_choice():
    _choose_variant.cache_clear()
    yield
    _choose_variant.cache_clear()


def saturating(a: torch.Tensor, b: torch.Tensor, shifted: str) -> torch.Tensor:
    """What oneDNN does without VNNI: one operand made unsigned, sums of neighbouring products saturated to 16 bits."""
    if shifted == "b":
        return saturating(b.t(), a.t(), "a").t().contiguous()
    a, b = torch.nn.functional.pad(a, (0, a.shape[1] % 2)), torch.nn.functional.pad(b, (0, 0, 0, b.shape[0] % 2))
    left, right = a.long() + 128, b.long()
    pairs = left[:, 0::2, None] * right[None, 0::2] + left[:, 1::2, None] * right[None, 1::2]
    return (pairs.clamp(-(2**15), 2**15 - 1).sum(1) - 128 * right.sum(0)).to(torch.int32)


def test_small_shapes_layouts_and_extremes():
    check_small_shapes()


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_processors_without_vnni(isa):
    command = "from kernels.test_int8_product import check_small_shapes; check_small_shapes()"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@given(matrix_pairs(st.just((8, 8)), largest=130))
@settings(max_examples=150, deadline=None)
def test_int8_matmul_is_exact(pair):
    a, b = (x.values for x in pair)
    result = int8_matmul(a, b)
    assert result.dtype == torch.int32
    assert torch.equal(result.long(), exact(a, b))


@pytest.mark.parametrize("k", [MAX_K, MAX_K + 1, MAX_K + 2, 2 * MAX_K + 1])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 3), (3, 1), (2, 2)])
def test_sums_that_would_leave_int32(k, m, n):
    for (fill_a, va), (fill_b, vb) in itertools.product((("low", -128), ("high", 127)), repeat=2):
        a, b = integers((m, k), 8, fill_a), integers((k, n), 8, fill_b)
        for left, right in ((a, b), (a.t().contiguous().t(), b.t().contiguous().t())):
            result = int8_matmul(left, right)
            assert result.dtype == (torch.int32 if k <= MAX_K else torch.int64)
            assert (result == k * va * vb).all()


def test_one_more_product_than_max_k_leaves_int32():
    assert MAX_K * 2**14 <= torch.iinfo(torch.int32).max < (MAX_K + 1) * 2**14


@pytest.mark.parametrize(("m", "k", "n"), list(itertools.product((0, 2), repeat=3)))
def test_empty_products_are_zeros(m, k, n):
    a, b = integers((m, k), 8), integers((k, n), 8)
    assert torch.equal(int8_matmul(a, b).long(), exact(a, b))


@given(st.integers(1, 4), st.integers(1, 4), st.data())
@settings(max_examples=100, deadline=None)
def test_operands_get_the_strides_of_fresh_tensors(rows, columns, data):
    matrix = lay_out(integers((rows, columns), 8), data.draw(st.sampled_from(MATRIX_LAYOUTS)))
    odd = [s if n != 1 else data.draw(st.integers(1, 9)) for n, s in zip(matrix.shape, matrix.stride(), strict=True)]
    matrix = matrix.as_strided(matrix.shape, odd)
    result = _canonical(matrix)
    fresh = {(columns, 1)} | ({(1, rows)} if rows > 1 and columns > 1 else set())
    assert torch.equal(result, matrix)
    assert result.stride() in fresh


def works(variant_name: str) -> bool:
    a, b = integers((33, 130), 8, "extremes", 1), integers((130, 65), 8, "extremes", 2)
    return serving_variant().name == variant_name and torch.equal(int8_matmul(a, b).long(), exact(a, b))


def test_a_kernel_of_wrong_sums_is_not_used(fresh_choice, monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: real_int_mm(a, b) + 1)
    assert works("float64")
    assert "wrong sums" in serving_variant().reason


def test_a_kernel_wrong_for_one_extreme_is_not_used(fresh_choice, monkeypatch):
    def wrong(a, b):
        return real_int_mm(a, b) - ((a[:, :1] == -128) & (b[:1] == -128)).int()

    monkeypatch.setattr(torch, "_int_mm", wrong)
    assert serving_variant().name != "int_mm"


@pytest.mark.parametrize("shifted", ["a", "b"])
def test_a_kernel_that_saturates_pairs_gets_split_operands(fresh_choice, monkeypatch, shifted):
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: saturating(a, b, shifted))
    assert works("int_mm_split")
    assert "no VNNI" in serving_variant().reason
    for fills in itertools.product(("low", "high", "extremes"), repeat=2):
        a, b = integers((5, 64), 8, fills[0]), integers((64, 3), 8, fills[1], 1)
        assert torch.equal(_split_product(a, b).long(), exact(a, b))


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError])
def test_a_missing_kernel_is_not_used(fresh_choice, monkeypatch, error):
    def missing(a, b):
        raise error("not built")

    monkeypatch.setattr(torch, "_int_mm", missing)
    assert works("float64")


@pytest.fixture
def onednn_switch():
    yield torch._C._set_mkldnn_enabled
    torch._C._set_mkldnn_enabled(True)


def test_float64_serves_while_onednn_is_off(fresh_choice, onednn_switch):
    a, b = (FixedPoint(integers((20, 20), 8, "extremes", seed), 8, 0) for seed in (1, 2))
    before = serving_variant().name
    onednn_switch(False)
    assert works("float64")
    assert "switched off" in serving_variant().reason
    assert same_bits(matmul(a, b), reference.matmul(a, b))
    onednn_switch(True)
    assert serving_variant().name == before


def test_describe_names_what_serves(backend):
    description = describe()
    ours = {"AMX": "compiled part, AMX", "VNNI": "compiled part, AVX-512 VNNI"}
    assert description["int8 product"].startswith(ours.get(backend, serving_variant().name))
    assert all(isinstance(text, str) and text for text in description.values())


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_and_threads_leave_no_trace(threads):
    a, b = integers((150, 333), 8, seed=1), integers((333, 70), 8, seed=2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        whole = int8_matmul(a, b)
        assert torch.equal(whole.long(), exact(a, b))
        for cut in (1, 2, 16, 149):
            assert torch.equal(torch.cat((int8_matmul(a[:cut], b), int8_matmul(a[cut:], b))), whole)
    finally:
        torch.set_num_threads(before)
