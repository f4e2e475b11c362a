"""Plans for the kernel tests, what each chain should write, and with what instructions they run."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from cnmix.inference.norms import fused_multiply_add
from cnmix.kernels import plan
from cnmix.kernels.plan import Add, AddValue, Clamp, LeakyRelu, Multiply, MultiplyAdd, Plan, Quantize, Relu, Store

from .strategies import same_bits as same_floats

# Of a module: its tests run with every instruction set that plans have.
PLANS = [
    pytest.mark.skipif(not plan.serves(), reason="plans need the compiled part and AVX-512 VNNI"),
    pytest.mark.usefixtures("instructions"),
    pytest.mark.parametrize("instructions", [3, 4], ids=("VNNI", "AMX"), indirect=True, scope="module"),
]


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
