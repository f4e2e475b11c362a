"""The compiled part's own product. What test_cpu.py tests of every way of multiplying is not repeated here."""

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnmix.fixed_point import BITS, FixedPoint, limits
from cnmix.kernels import cpu, native, reference, tiles

from .strategies import Convolution, conv_layout, convolutions, integers, lay_out, matrix_pairs, same_bits, seeds

pytestmark = [
    pytest.mark.parametrize("backend", ["AMX", "VNNI"], indirect=True),
    pytest.mark.usefixtures("backend"),
]

# Sums of two such positions are within the range that the compiled part serves.
served_positions = st.one_of(st.integers(-20, 20), st.sampled_from((-63, 63)))
# Around the sides of a tile (16 x 64), of a block of four (32) and of what is read at once (64).
tile_sizes = st.sampled_from((0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 80, 127, 128, 129))


def mixes(backend):
    """Lists the pairs of widths that the backend multiplies itself."""
    return [(8, 8)] if backend == "VNNI" else list(itertools.product(BITS, repeat=2))


def operand(shape, bits, fill="random", seed=0, position=-5):
    return FixedPoint(integers(shape, bits, fill, seed), bits, position)


def multiply(a, b, bias=None):
    assert tiles.serve(a, b)
    return tiles.matmul(a, b, bias)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def skip_unserved(backend, *bits):
    if backend == "VNNI" and set(bits) != {8}:
        pytest.skip("VNNI multiplies int8 alone")


@given(st.data(), seeds)
@settings(max_examples=300, deadline=None)
def test_matrices_of_any_size_and_layout_have_the_bits_of_the_reference(backend, data, seed):
    pair = data.draw(matrix_pairs(st.sampled_from(mixes(backend)), served_positions, size=tile_sizes))
    n = pair[1].values.shape[1]
    bias = normal(n, seed=seed) * 100 if data.draw(st.booleans()) else None
    expected = reference.matmul(*pair)
    assert same_bits(multiply(*pair, bias), expected if bias is None else expected + bias)


@pytest.mark.parametrize("bits", list(itertools.product(BITS, repeat=2)))
@pytest.mark.parametrize("fills", list(itertools.product(("low", "high", "extremes"), repeat=2)))
def test_extremes_of_every_pair_of_widths(backend, bits, fills):
    skip_unserved(backend, *bits)
    a, b = (operand(s, w, f) for s, w, f in zip(((33, 130), (130, 18)), bits, fills, strict=True))
    assert same_bits(multiply(a, b), reference.matmul(a, b))


def test_vnni_multiplies_int8_alone(backend):
    for bits in itertools.product(BITS, repeat=2):
        a, b = (operand((2, 2), w) for w in bits)
        assert tiles.serve(a, b) == (bits in mixes(backend))
        assert same_bits(cpu.matmul(a, b, exact_int31=True), reference.matmul(a, b))


# Around the K that is packed at once (8192 bytes of the wider operand), twice that, and the end of int32 sums.
LONG = {
    (8, 8): (8191, 8192, 8193, 16384, 16385, 131071, 131072, 131073, 140001),
    (16, 8): (4096, 4097, 131073),
    (8, 16): (4097, 12301),
    (16, 16): (4095, 4096, 4097, 12301, 131073),
    (31, 8): (2049, 4160),
    (8, 31): (2049, 8257),
    (31, 16): (2047, 2049),
    (16, 31): (2049, 6200),
    (31, 31): (2047, 2048, 2049, 6200),
}


@pytest.mark.parametrize(("bits", "k"), [(bits, k) for bits, sizes in LONG.items() for k in sizes])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (17, 35)])
def test_k_of_several_pieces(backend, bits, k, m, n):
    skip_unserved(backend, *bits)
    bias = normal(n)
    for fills in (("low", "low"), ("low", "high"), ("random", "extremes")):
        a, b = (operand(s, w, f) for s, w, f in zip(((m, k), (k, n)), bits, fills, strict=True))
        if fills[0] == "random":
            expected = reference.matmul(a, b)
        else:
            (va, vb), scale = (limits(w)[f == "high"] for w, f in zip(bits, fills, strict=True)), 2.0**-10
            expected = torch.full((m, n), reference.round_to_float32(k * va * vb) * scale)
        for layouts in (("contiguous", "contiguous"), ("transposed", "transposed")):
            left, right = (x._replace(values=lay_out(x.values, y)) for x, y in zip((a, b), layouts, strict=True))
            assert same_bits(multiply(left, right), expected)
            assert same_bits(multiply(left, right, bias), expected + bias)


# Few rows and many columns share a block of rows; 16 MiB of packed columns are multiplied at once.
SHAPES = {
    "few rows, many columns": (3, 300, 5000),
    "many rows, few columns": (5000, 300, 3),
    "one row": (1, 700, 900),
    "all sides": (261, 517, 305),
    "columns beyond one piece": (5, 4200, 4200),
    "columns and K beyond one piece": (5, 8300, 4200),
}


@functools.cache  # the same for both ways of multiplying
def product_of(shape, bits):
    m, k, n = SHAPES[shape]
    if 31 in bits:  # the reference goes through Python's integers
        m, n = min(m, 33), min(n, 70)
    a, b = operand((m, k), bits[0]), operand((k, n), bits[1], seed=1)
    return a, b._replace(values=lay_out(b.values, "transposed")), reference.matmul(a, b)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [(8, 8), (16, 16), (8, 31)])
def test_any_number_of_threads_gives_the_bits_of_the_reference(backend, shape, bits):
    skip_unserved(backend, *bits)
    a, b, expected = product_of(shape, bits)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        assert same_bits(multiply(a, b), expected)


def test_products_of_several_python_threads_do_not_mix():
    pairs = [(operand((50 + i, 300), 8, seed=i), operand((300, 70 + i), 8, seed=9)) for i in range(6)]
    expected = [reference.matmul(*pair) for pair in pairs]
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda pair: [multiply(*pair) for _ in range(20)], pairs))
    for several, one in zip(results, expected, strict=True):
        assert all(same_bits(result, one) for result in several)


def test_bias_of_another_type_layout_or_with_a_gradient():
    a, b = operand((5, 20), 8), operand((20, 40), 8, seed=1)
    plain = reference.matmul(a, b)
    for bias in (
        normal(80)[::2],
        normal(40, dtype=torch.float64),
        normal(40).bfloat16(),
        torch.nn.Parameter(normal(40)),
    ):
        assert same_bits(multiply(a, b, bias), plain + bias.detach().float())


@pytest.mark.parametrize("positions", [(-63, -63), (-128, 2), (127, 0), (100, 27), (-64, -63), (127, 1), (-128, -128)])
@pytest.mark.parametrize("fill", ["random", "extremes", "small"])
def test_scales_at_the_edge_of_float32_are_left_to_torch(positions, fill):
    a, b = operand((7, 40), 8, fill, 0, positions[0]), operand((40, 9), 8, fill, 1, positions[1])
    assert tiles.serve(a, b) == (-126 <= sum(positions) <= 127)
    assert same_bits(cpu.matmul(a, b), reference.matmul(a, b))
    case = conv_case(fill=fill)
    case = case._replace(
        **{
            name: getattr(case, name)._replace(position=p)
            for name, p in zip(("x", "weight", "grad_output"), (*positions, positions[0]), strict=True)
        }
    )
    check(case)


def test_operands_that_are_not_finite_are_not_multiplied():
    a, b = operand((3, 4), 8), operand((4, 5), 8)
    assert cpu.matmul(a._replace(finite=False), b).isnan().all()


def test_int31_is_exact_without_being_asked(backend):
    skip_unserved(backend, 31)
    a, b = operand((20, 300), 31, "extremes"), operand((300, 20), 31, "extremes", 1)
    assert same_bits(cpu.matmul(a, b), reference.matmul(a, b))


def conv_case(
    images=3, spatial=(7, 6), groups=1, in_each=4, out_each=4, kernel=(3, 3), stride=(1, 1), padding=(1, 1),
    dilation=(1, 1), bits=(8, 8, 8), layout="contiguous", fill="random",
):  # fmt: skip
    size = reference.output_size(spatial, kernel, stride, padding, dilation)
    out = groups * out_each
    shapes = (images, groups * in_each, *spatial), (out, in_each, *kernel), (images, out, *size)
    x, weight, grad_output = (operand(s, b, fill, i) for i, (s, b) in enumerate(zip(shapes, bits, strict=True)))
    x, grad_output = (t._replace(values=conv_layout(t.values, layout)) for t in (x, grad_output))
    return Convolution(x, weight, grad_output, stride, padding, dilation, groups)


def check(case):
    """Holds the three products of a convolution against the reference, in both layouts of the results."""
    expected = case.run(reference)
    for result, other in zip(case.run(cpu), expected, strict=True):
        assert same_bits(result, other)
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    for layout in (False, True):
        output = cpu.convolution(case.x, case.weight, *geometry, channels_last=layout)
        assert same_bits(output, expected[0])
        shape = case.x.values.shape
        grad_input = cpu.convolution_grad_input(case.grad_output, case.weight, shape, *geometry, channels_last=layout)
        assert same_bits(grad_input, expected[1])


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_convolutions_of_any_geometry_have_the_bits_of_the_reference(backend, data):
    widths = st.sampled_from((8,) if backend == "VNNI" else BITS)
    case = data.draw(convolutions(widths, served_positions, st.sampled_from((0, 1, 2, 3, 9, 17))))
    assert all(tiles.serve(*pair) for pair in case.pairs())
    check(case)


@pytest.mark.parametrize("bits", [(8, 8, 8), (16, 16, 16), (8, 16, 31)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_of_many_channels(backend, bits, layout, groups, stride):
    skip_unserved(backend, *bits)
    sizes = (2, (5, 4), groups, 9, 10) if 31 in bits else (5, (11, 9), groups, 35, 37)
    check(conv_case(*sizes, stride=(stride, stride), bits=bits, layout=layout))


@pytest.mark.parametrize("spatial", [(1,), (3,), (5,), (1, 1), (2, 3), (3, 5), (1, 2, 2), (2, 2, 3)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_images_of_fewer_positions_than_a_tile_has_rows(spatial, layout, kernel):
    ones = (1,) * len(spatial)
    case = conv_case(
        *(41, spatial, 1, 20, 19, (kernel,) * len(spatial), ones, (kernel // 2,) * len(spatial), ones), layout=layout
    )
    check(case)
    bias = normal(19)
    for last in (False, True):
        output = cpu.convolution(*case[:2], *case[3:], bias=bias, channels_last=last)
        expected = reference.convolution(*case[:2], *case[3:])
        assert same_bits(output, expected + bias.view(-1, *ones))


@pytest.mark.parametrize(("padding", "kernel", "dilation"), [(4, 1, 1), (5, 3, 2), (7, 2, 3)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_padding_wider_than_the_kernel_cuts_the_gradient_off(padding, kernel, dilation, stride):
    check(conv_case(3, (6, 5), 2, 8, 16, (kernel,) * 2, (stride,) * 2, (padding,) * 2, (dilation,) * 2))


@pytest.mark.parametrize("bits", [(8, 8, 8), (16, 16, 16)])
def test_weight_gradients_over_more_positions_than_one_piece(backend, bits):
    skip_unserved(backend, *bits)
    for images, length in ((3, 3000), (5, 28000)):
        case = conv_case(images, (length,), 1, 3, 5, (3,), (1,), (1,), (1,), bits)
        expected = reference.convolution_grad_weight(case.grad_output, case.x, (5, 3, 3), *case[3:])
        assert same_bits(cpu.convolution_grad_weight(case.grad_output, case.x, (5, 3, 3), *case[3:]), expected)
    low = case._replace(x=operand((5, 3, 28000), bits[0], "low"), grad_output=operand((5, 5, 28000), bits[2], "low"))
    expected = reference.convolution_grad_weight(low.grad_output, low.x, (5, 3, 3), *case[3:])
    assert same_bits(cpu.convolution_grad_weight(low.grad_output, low.x, (5, 3, 3), *case[3:]), expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_convolutions_have_the_same_bits_with_any_number_of_threads(layout):
    case = conv_case(16, (14, 13), 2, 24, 24, layout=layout)
    expected = case.run(reference)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for result, other in zip(case.run(cpu), expected, strict=True):
            assert same_bits(result, other)


def test_torchs_own_use_of_the_tile_registers_is_left_intact():
    # oneDNN keeps a configuration of the same registers per thread; sizes differ so that configurations do.
    ours = [(operand((m, 200), 8, seed=m), operand((200, 90), 8, seed=1)) for m in (33, 160)]
    theirs = [(normal(m, 130, seed=m).bfloat16(), normal(130, n, seed=n).bfloat16()) for m, n in ((40, 50), (129, 17))]
    pictures, kernels = normal(2, 16, 9, 9).bfloat16(), normal(24, 16, 3, 3, seed=1).bfloat16()

    def float_products():
        return [*(a @ b for a, b in theirs), torch.nn.functional.conv2d(pictures, kernels)]

    for threads in (1, 2):
        torch.set_num_threads(threads)
        alone = float_products()
        for (a, b), result in zip(theirs, alone, strict=False):
            assert torch.allclose(result.double(), a.double() @ b.double(), rtol=1e-2, atol=0.1)
        expected = [reference.matmul(*pair) for pair in ours]
        for _ in range(5):
            for pair, one in zip(ours, expected, strict=True):
                assert same_bits(multiply(*pair), one)
                assert all(torch.equal(a, b) for a, b in zip(float_products(), alone, strict=True))


def test_a_large_result_comes_from_kept_memory():
    a, b = operand((600, 64), 8), operand((64, 700), 8, seed=1)
    first = multiply(a, b)
    place, expected = first.data_ptr(), first.clone()
    del first
    for _ in range(3):
        result = multiply(a, b)
        assert result.data_ptr() == place
        assert torch.equal(result, expected)
        del result
    native.library().cnmix_release_memory()
    assert same_bits(multiply(a, b), reference.matmul(a, b))
