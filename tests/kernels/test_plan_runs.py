"""How plans run: in shared memory, in turns, in several threads, with tensors of any strides; and mistakes."""

import threading

import pytest
import torch
import torch.nn.functional as F

from cnmix.kernels.plan import Add, AddValue, LeakyRelu, Multiply, MultiplyAdd, Plan, Quantize, Relu, Store

from .plan_checks import PLANS, channels_last, empty, exact_sums, run, same_bits, to_integers
from .strategies import integers

pytestmark = PLANS


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
