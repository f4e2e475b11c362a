import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cnmix.inference.norms import fused_multiply_add
from cnmix.kernels import native, plan
from cnmix.kernels.plan import Add, AddValue, Clamp, LeakyRelu, Multiply, MultiplyAdd, Plan, Quantize, Relu, Store

from .strategies import FILLS, integers, nearly_cancelling, rounded_once
from .strategies import same_bits as same_floats

pytestmark = pytest.mark.skipif(not plan.serves(), reason="plans need the compiled part and AVX-512 VNNI")

CHANNELS = (1, 3, 5, 16, 17, 33, 64, 96)
ISAS = (3, 4)


@pytest.fixture(scope="module", params=ISAS, ids=("VNNI", "AMX"), autouse=True)
def instructions(request):
    library = native.library()
    best = library.cnmix_isa(-1)
    if request.param > best:
        pytest.skip("this processor has not these instructions")
    library.cnmix_isa(request.param)
    yield request.param
    library.cnmix_isa(best)


def same_bits(a, b):
    return torch.equal(a, b) if a.dtype == b.dtype != torch.float32 else same_floats(a, b)


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def empty(value):
    return channels_last(torch.full(value.shape, 77, dtype=value.dtype))


def run(made, inputs, values, threads=(1, 2)):
    """Finishes and runs a plan; any number of threads gives the same bits."""
    made.finish()
    results = []
    for count in threads:
        torch.set_num_threads(count)
        outputs = [empty(value) for value in values]
        assert made.run(inputs, outputs)
        results.append(outputs)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))
    return results[0]


def exact_sums(x, weight, stride=(), padding=(), dilation=(), groups=1):
    """float32 of the integer sums, which float64 holds; integers have no negative zero."""
    if weight.dim() == 2:
        return (x.double().movedim(1, -1) @ weight.double().t()).movedim(-1, 1).float() + 0.0
    convolve = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    return convolve(x.double(), weight.double(), None, stride, padding, dilation, groups).float() + 0.0


def to_integers(x, bits, position):
    limit = 2.0 ** (bits - 1)
    rounded = (x.double() * 2.0**-position).round().clamp(-limit, limit - 1)
    return rounded.to(torch.int8 if bits == 8 else torch.int16)


def per_channel(values, like):
    return values.view(-1, *(1,) * (like.dim() - 2))


def reference_chain(x, stages):
    """Applies a chain whose values stand for tensors; returns what it wrote."""
    written = []
    for stage in stages:
        match stage:
            case Multiply(Tensor() as factors):
                x = x * per_channel(factors, x)
            case Multiply(factor):
                x = x * torch.tensor(factor, dtype=torch.float32)
            case Add(terms):
                x = x + per_channel(terms, x)
            case MultiplyAdd(factors, terms):
                x = fused_multiply_add(x, per_channel(factors, x), per_channel(terms, x))
            case AddValue(value):
                x = x + value
            case Relu():
                x = torch.relu(x)
            case LeakyRelu(slope):
                x = torch.where(x > 0, x, x * slope)
            case Clamp(low, high):
                x = torch.clamp(x, low, high)
            case Store():
                written.append(x)
            case Quantize(_, bits, position):
                written.append(to_integers(x, bits, position))
    return written


Tensor = torch.Tensor


def draw_chain(data, channels, shape, scale):
    """A chain on elements of about `scale`, ending in floats and integers; values stand for tensors."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    position = data.draw(st.integers(-3, 3))
    makers = {
        "number": lambda: Multiply(0.3),
        "factors": lambda: Multiply(torch.rand(channels, generator=generator) + 0.5),
        "terms": lambda: Add(torch.randn(channels, generator=generator)),
        "both": lambda: MultiplyAdd(*torch.randn(2, channels, generator=generator)),
        "residual": lambda: AddValue(torch.randn(shape, generator=generator)),
        "relu": Relu,
        "leaky": lambda: LeakyRelu(0.1),
        "clamp": lambda: Clamp(-3.0, 2.5),
        "store": lambda: Store(None),
        "int8": lambda: Quantize(None, 8, position - 5),
        "int16": lambda: Quantize(None, 16, position - 12),
    }
    names = data.draw(st.lists(st.sampled_from(sorted(makers)), max_size=6))
    chain = [Multiply(scale), *(makers[name]() for name in names)]
    return [*chain, Store(None), Quantize(None, 8, position - 6)]


def check_chain(made, add, stages, shape, sums, inputs):
    """Builds the chain with the plan's values, runs it and compares all that it wrote."""
    chain, outputs = [], []
    for stage in stages:
        if isinstance(stage, AddValue):
            inputs.append(stage.value)
            chain.append(AddValue(made.input(shape, torch.float32)))
        elif isinstance(stage, Store):
            outputs.append(made.output(shape, torch.float32))
            chain.append(Store(outputs[-1]))
        elif isinstance(stage, Quantize):
            outputs.append(made.output(shape, torch.int8 if stage.bits == 8 else torch.int16))
            chain.append(stage._replace(value=outputs[-1]))
        else:
            chain.append(stage)
    add(chain)
    for result, expected in zip(run(made, inputs, outputs), reference_chain(sums, stages), strict=True):
        assert same_bits(result, expected)


def check_product(data, x, weight, **geometry):
    sums = exact_sums(x, weight, **geometry)
    stages = draw_chain(data, sums.shape[1], sums.shape, 2.0**-14)
    made = Plan()
    source = made.input(x.shape, torch.int8)
    check_chain(made, lambda chain: made.product(source, weight, chain, **geometry), stages, sums.shape, sums, [x])


@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.sampled_from(("one", "two", "each")))
@settings(max_examples=80, deadline=None)
def test_convolutions(data, dims, images, grouping):
    def each(low, high):
        return data.draw(st.tuples(*[st.integers(low, high)] * dims))

    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    padding = tuple(data.draw(st.integers(0, r + 1)) for r in reach)
    spatial = [max(1, r + 1 - 2 * p) + more for r, p, more in zip(reach, padding, each(0, 6), strict=True)]
    channels, outputs = data.draw(st.sampled_from(CHANNELS)), data.draw(st.sampled_from(CHANNELS))
    groups = {"one": 1, "two": 2, "each": channels}[grouping]
    if grouping == "two":
        channels, outputs = 2 * channels, 2 * outputs
    if grouping == "each":
        outputs = channels
    fills = data.draw(st.tuples(st.sampled_from(FILLS), st.sampled_from(FILLS)))
    x = integers((images, channels, *spatial), 8, fills[0], 1)
    weight = integers((outputs, channels // groups, *kernel), 8, fills[1], 2)
    check_product(data, x, weight, stride=stride, padding=padding, dilation=dilation, groups=groups)


@given(st.data(), st.sampled_from((1, 7, 16, 17, 32, 49, 100)), st.sampled_from((1, 63, 64, 65, 255, 320)))
@settings(max_examples=40, deadline=None)
def test_matrices(data, rows, depth):
    outputs = data.draw(st.sampled_from((*CHANNELS, 255, 300)))
    fills = data.draw(st.tuples(st.sampled_from(FILLS), st.sampled_from(FILLS)))
    check_product(data, integers((rows, depth), 8, fills[0], 1), integers((outputs, depth), 8, fills[1], 2))


@pytest.mark.parametrize(
    ("shape", "outputs", "kernel", "stride", "padding"),
    [
        ((1, 3, 60, 64), 64, 7, 2, 3),
        ((2, 64, 28, 28), 48, 3, 1, 1),
        ((1, 128, 28, 28), 128, 3, 2, 1),
        ((1, 256, 14, 14), 512, 1, 2, 0),
        ((1, 512, 7, 7), 256, 3, 1, 1),
        ((3, 512, 7, 7), 255, 1, 1, 0),
    ],
)
def test_shapes_of_networks(shape, outputs, kernel, stride, padding):
    x, weight = integers(shape, 8), integers((outputs, shape[1], kernel, kernel), 8, seed=1)
    geometry = {"stride": (stride,) * 2, "padding": (padding,) * 2, "dilation": (1, 1)}
    sums = exact_sums(x, weight, **geometry)
    stages = [Multiply(2.0**-15), Add(torch.randn(outputs)), Relu(), Store(None), Quantize(None, 8, -4)]
    made = Plan()
    source = made.input(shape, torch.int8)
    check_chain(made, lambda chain: made.product(source, weight, chain, **geometry), stages, sums.shape, sums, [x])


@given(st.data(), st.sampled_from(CHANNELS), st.integers(1, 3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_elements(data, channels, images, first):
    spatial = data.draw(st.sampled_from(((), (5,), (7, 9), (33, 20), (3, 4, 5))))
    x = torch.randn(images, channels, *spatial)
    stages = draw_chain(data, channels, x.shape, 0.7)
    made = Plan()
    source = made.input(x.shape, torch.float32)
    # Read as it lies, or channels last.
    given_x = x if first else channels_last(x)
    check_chain(made, lambda chain: made.elements(source, chain), stages, x.shape, x, [given_x])


@given(
    st.data(), st.integers(1, 2), st.sampled_from(CHANNELS), st.sampled_from((torch.int8, torch.float32, torch.int16))
)
@settings(max_examples=60, deadline=None)
def test_max_pool(data, dims, channels, dtype):
    def each(low, high):
        return data.draw(st.tuples(*[st.integers(low, high)] * dims))

    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    spatial = [d * (k - 1) + 1 + more for k, d, more in zip(kernel, dilation, each(0, 5), strict=True)]
    x = integers((2, channels, *spatial), 8, data.draw(st.sampled_from(FILLS)), 3).to(dtype)
    if dtype == torch.float32:
        x.view(-1)[0] = float("nan")
    pool = F.max_pool1d if dims == 1 else F.max_pool2d
    expected = pool(x.double(), kernel, stride, padding, dilation)
    made = Plan()
    source, target = made.input(x.shape, dtype), made.output(expected.shape, dtype)
    made.max_pool(source, target, kernel, stride, padding, dilation)
    (result,) = run(made, [x], [target])
    assert torch.equal(result.double().nan_to_num(7e7), expected.nan_to_num(7e7))


@given(st.lists(st.sampled_from(CHANNELS), min_size=1, max_size=4), st.sampled_from((torch.int8, torch.float32)))
@settings(max_examples=20, deadline=None)
def test_concatenation_and_upsampling(channels, dtype):
    parts = [integers((2, c, 3, 5), 8, seed=c).to(dtype) for c in channels]
    made = Plan()
    values = [made.input(x.shape, dtype) for x in parts]
    whole = made.value((2, sum(channels), 3, 5), dtype)
    made.concatenate(values, whole)
    target = made.output((2, sum(channels), 6, 15), dtype)
    made.upsample_nearest(whole, target)
    (result,) = run(made, parts, [target])
    assert same_bits(result, torch.cat(parts, 1).repeat_interleave(2, 2).repeat_interleave(3, 3))


def residual_network(blocks=5, channels=40, size=9):
    """Returns a plan of residual blocks, an input and what its two outputs should be."""
    made, shape = Plan(), (2, channels, size, size)
    weights = [integers((channels, channels, 3, 3), 8, seed=i) for i in range(2 * blocks)]
    geometry = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    x = torch.randn(shape)
    inside = made.value(shape, torch.float32)
    integer = made.value(shape, torch.int8)
    made.elements(made.input(shape, torch.float32), [Store(inside), Quantize(integer, 8, -5)])
    known, known_integer = x, to_integers(x, 8, -5)
    for first, second in zip(weights[::2], weights[1::2], strict=True):
        middle, after, after_integer = (made.value(shape, d) for d in (torch.int8, torch.float32, torch.int8))
        made.product(integer, first, [Multiply(2.0**-14), Relu(), Quantize(middle, 8, -5)], **geometry)
        chain = [Multiply(2.0**-14), AddValue(inside), LeakyRelu(0.25), Store(after), Quantize(after_integer, 8, -4)]
        made.product(middle, second, chain, **geometry)
        known_middle = to_integers(torch.relu(exact_sums(known_integer, first, **geometry) * 2.0**-14), 8, -5)
        known = F.leaky_relu(exact_sums(known_middle, second, **geometry) * 2.0**-14 + known, 0.25)
        known_integer = to_integers(known, 8, -4)
        inside, integer = after, after_integer
    outputs = made.output(shape, torch.float32), made.output(shape, torch.int8)
    copy = made.value(shape, torch.float32)
    made.elements(inside, [Store(copy)])
    made.elements(copy, [Store(outputs[0]), Quantize(outputs[1], 8, -4)])
    return made, x, outputs, (known, known_integer)


def test_values_share_memory():
    made, x, outputs, expected = residual_network()
    results = run(made, [x], outputs, threads=(1, 2, 3))
    assert len(made.profile([x], results)) == 13
    assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))
    # A sum with a residual takes its place, and no block needs memory of its own.
    assert made.arena_bytes < 2 * x.numel() * 4 + 3 * x.numel()


@pytest.mark.parametrize("position", [-6, -1, 3])
@pytest.mark.parametrize("middle", [Relu(), LeakyRelu(0.1), Clamp(-20.0, 30.0)])
@pytest.mark.parametrize("roundings", [1, 2])
def test_integers_of_bounded_sums(position, middle, roundings):
    """No element can be infinite where only integers come in: such chains take shorter ways."""
    x, weight, more = (
        integers((1, 48, 9, 7), 8),
        integers((40, 48, 1, 1), 8, seed=1),
        integers((40, 48, 1, 1), 8, seed=2),
    )
    factors, terms = torch.rand(40) * 2.0**-9, torch.randn(40) * 100
    sums, others = exact_sums(x, weight, (1, 1), (0, 0), (1, 1)), exact_sums(x, more, (1, 1), (0, 0), (1, 1))
    affine = [MultiplyAdd(factors, terms)] if roundings == 1 else [Multiply(factors), Add(terms)]
    stages = [Multiply(0.5), *affine, middle]
    (known,) = reference_chain(sums, [*stages, Store(None)])
    (residual,) = reference_chain(others, [Multiply(2.0**-8), Store(None)])
    (total,) = reference_chain(known, [AddValue(residual), Relu(), Store(None)])
    made, shape = Plan(), sums.shape
    source, inside, integer = (
        made.input(x.shape, torch.int8),
        made.value(shape, torch.float32),
        made.output(shape, torch.int8),
    )
    floats, both = made.output(shape, torch.float32), made.output(shape, torch.int8)
    made.product(source, weight, [*stages, Quantize(integer, 8, position)])
    made.product(source, more, [Multiply(2.0**-8), Store(inside)])
    made.product(source, weight, [*stages, AddValue(inside), Relu(), Store(floats), Quantize(both, 8, position)])
    results = run(made, [x], [integer, floats, both])
    for result, expected in zip(
        results, (to_integers(known, 8, position), total, to_integers(total, 8, position)), strict=True
    ):
        assert same_bits(result, expected)


@pytest.mark.parametrize(
    "constants",
    [
        [Multiply(float("inf"))],
        [Multiply(1e38), Multiply(1e30)],
        [Add(torch.full((4,), torch.nan))],
        [MultiplyAdd(torch.ones(4), torch.full((4,), torch.inf))],
        [MultiplyAdd(torch.full((4,), 1e37), torch.zeros(4))],
    ],
)
def test_constants_that_are_not_finite(constants):
    x, weight = integers((3, 8), 8), integers((4, 8), 8, seed=1)
    made = Plan()
    source, target = made.input(x.shape, torch.int8), made.output((3, 4), torch.int8)
    made.product(source, weight, [*constants, Relu(), Quantize(target, 8, 0)])
    made.finish()
    assert not made.run([x], [empty(target)])


@pytest.mark.parametrize("last", [False, True])
def test_larger_batches_take_turns(last):
    made, x, outputs, _ = residual_network(blocks=2)
    made.finish()
    parts = [x, x * 2, x.flip(0)]
    expected = [[empty(value) for value in outputs] for _ in parts]
    for part, results in zip(parts, expected, strict=True):
        assert made.run([part], results)
    batch = torch.cat(parts)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results = [channels_last(torch.zeros(6, *value.shape[1:], dtype=value.dtype)) for value in outputs]
        assert made.run([channels_last(batch) if last else batch], results)
        assert all(same_bits(a, torch.cat(b)) for a, b in zip(results, zip(*expected, strict=True), strict=True))
    with pytest.raises(ValueError, match="the plan takes Value"):
        made.run([batch], expected[0])
    with pytest.raises(ValueError, match="the plan takes Value"):
        made.run([batch[:5]], [result[:5] for result in results])


def test_any_thread_may_run_a_plan():
    made, x, outputs, _ = residual_network(blocks=2)
    made.finish()
    inputs = [x * scale for scale in (1, 2, 3)]
    expected = [[empty(value) for value in outputs] for _ in inputs]
    for one, results in zip(inputs, expected, strict=True):
        made.run([one], results)
    wrong = []

    def work(index):
        for _ in range(10):
            results = [empty(value) for value in outputs]
            if not made.run([inputs[index]], results):
                wrong.append(index)
            wrong.extend(index for a, b in zip(results, expected[index], strict=True) if not same_bits(a, b))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 100, 2 * 17 * 35 - 1])
def test_values_that_are_not_finite(bad, place):
    x = torch.randn(2, 17, 5, 7)
    x.view(-1)[place] = bad
    made = Plan()
    source, floats, target = made.input(x.shape, torch.float32), made.output(x.shape, torch.float32), None
    made.elements(source, [Relu(), Clamp(-1.0, 1.0), LeakyRelu(0.5), Store(floats)])
    made.finish()
    outputs = [empty(floats)]
    assert made.run([x], outputs)  # floats may be anything
    assert same_bits(outputs[0].nan_to_num(9.0), torch.relu(x).clamp(-1, 1).nan_to_num(9.0))
    made = Plan()
    source, target = made.input(x.shape, torch.float32), made.output(x.shape, torch.int8)
    made.elements(source, [Multiply(2.0), Quantize(target, 8, -5)])
    made.finish()
    outputs = [empty(target)]
    assert not made.run([x], outputs)
    assert not made.run([channels_last(x)], outputs)
    assert made.run([x.nan_to_num(0.0, 1.0, -1.0)], outputs)


def test_quantization_at_the_ends_of_float32():
    x = torch.tensor([[3.4e38, -3.4e38, 1e-45, -1e-45, 0.5, 1.5, 2.5, -0.5, -0.0, 127.5, -128.5, 2.0**-120]])
    for position in (-128, -127, -126, 0, 100, 126, 127, 128):
        made = Plan()
        source, target = made.input(x.shape, torch.float32), made.output(x.shape, torch.int8)
        made.elements(source, [Quantize(target, 8, position)])
        (result,) = run(made, [x], [target])
        assert same_bits(result, to_integers(x, 8, position))


@pytest.mark.parametrize("channels", [5, 48])
def test_multiply_add_is_exact_before_it_rounds(channels):
    x, factors, terms = nearly_cancelling(40, channels)
    made = Plan()
    source, target = made.input(x.shape, torch.float32), made.output(x.shape, torch.float32)
    made.elements(source, [MultiplyAdd(factors, terms), Store(target)])
    (result,) = run(made, [x], [target])
    assert same_bits(result, rounded_once(x, factors, terms))
    assert not same_bits(result, x * factors + terms)


def test_multiply_add_of_values_that_are_not_finite():
    x = torch.tensor([[torch.inf, -torch.inf, torch.nan, 1.0, 0.0, -0.0, 3e38, torch.inf]])
    factors, terms = torch.tensor([2.0, 2, 2, 0, 1, 1, 2, 0]), torch.tensor([1.0, 1, 1, -0.0, -0.0, -0.0, -3e38, 1])
    made = Plan()
    source, target = made.input(x.shape, torch.float32), made.output(x.shape, torch.float32)
    made.elements(source, [MultiplyAdd(factors, terms), Store(target)])
    (result,) = run(made, [x], [target])
    expected = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0, 0.0, -0.0, 3e38, torch.nan]])
    assert same_bits(result.nan_to_num(9.0), expected.nan_to_num(9.0))


def test_longest_sum():
    rows = integers((1, 131071), 8, "low")
    made = Plan()
    source, target = made.input(rows.shape, torch.int8), made.output((1, 2), torch.float32)
    made.product(source, integers((2, 131071), 8, "low"), [Store(target)])
    (result,) = run(made, [rows], [target])
    assert result.unique().item() == torch.tensor(131071 * 2**14).float().item()
    with pytest.raises(ValueError, match="K of 131072"):
        Plan().product(Plan().input((1, 131072), torch.int8), integers((2, 131072), 8), [])


def test_strided_inputs():
    x = torch.randn(2, 5, 8, 6)
    sliced = torch.randn(2, 5, 8, 12)[..., ::2].copy_(x)
    made = Plan()
    source, other = made.input(x.shape, torch.float32), made.input(x.shape, torch.float32)
    target = made.output(x.shape, torch.float32)
    made.elements(source, [AddValue(other), Store(target)])
    made.finish()
    for given_x in (x, sliced, channels_last(x)):
        for given_other in (x, sliced, channels_last(x)):
            outputs = [empty(target)]
            assert made.run([given_x, given_other], outputs)
            assert same_bits(outputs[0], x + x)


def test_mistakes_are_named():
    made = Plan()
    image, rows = made.input((1, 4, 5, 5), torch.int8), made.input((2, 8), torch.float32)
    weight = integers((6, 4, 3, 3), 8)
    with pytest.raises(ValueError, match="multiplies int8"):
        made.product(rows, weight, [])
    with pytest.raises(ValueError, match="does not fit"):
        made.product(image, integers((6, 3, 3, 3), 8), [])
    with pytest.raises(ValueError, match="a number for each"):
        made.product(image, weight, [], stride=(1,))
    with pytest.raises(ValueError, match="Store of 9 rows of 6 channels"):
        made.product(image, weight, [Store(made.output((1, 6, 5, 5), torch.float32))])
    with pytest.raises(ValueError, match="constants of 8 channels"):
        made.elements(rows, [Add(torch.zeros(7))])
    with pytest.raises(ValueError, match="constants of 8 channels"):
        made.elements(rows, [MultiplyAdd(torch.zeros(8), torch.zeros(7))])
    with pytest.raises(ValueError, match="no step before"):
        made.elements(made.value((2, 8), torch.float32), [])
    with pytest.raises(ValueError, match="at most 32 stages"):
        made.elements(rows, [Relu()] * 33)
    with pytest.raises(ValueError, match="repeated"):
        made.upsample_nearest(image, made.value((1, 4, 6, 5), torch.int8))
    with pytest.raises(ValueError, match="side by side"):
        made.concatenate([image], made.value((1, 5, 5, 5), torch.int8))
    made = Plan()
    rows, target = made.input((2, 8), torch.float32), made.output((2, 8), torch.float32)
    with pytest.raises(ValueError, match="no step writes"):
        made.finish()
    made.elements(rows, [Store(target)])
    with pytest.raises(ValueError, match="written already"):
        made.elements(rows, [Store(target)])
    with pytest.raises(ValueError, match="finish the plan"):
        made.run([], [])
    made.finish()
    with pytest.raises(ValueError, match="takes 1 inputs"):
        made.run([], [])
    with pytest.raises(ValueError, match="the plan takes Value"):
        made.run([torch.zeros(2, 7)], [torch.zeros(2, 8)])
    with pytest.raises(ValueError, match="channels last"):
        made.run([torch.zeros(2, 8)], [torch.zeros(8, 2).t()])
    with pytest.raises(ValueError, match="finished"):
        made.elements(rows, [])
