from typing import NamedTuple

import torch
import torch.nn.functional as F


def serves():
    return False


class Value:
    def __init__(s, shape, dtype, kind):
        s.shape = tuple(shape)
        s.dtype = dtype
        s.kind = kind
        s.t = None


class Multiply(NamedTuple):
    factors: object


class Add(NamedTuple):
    terms: object


class AddValue(NamedTuple):
    value: object


class Relu(NamedTuple):
    pass


class LeakyRelu(NamedTuple):
    slope: float


class Clamp(NamedTuple):
    low: float
    high: float


class Store(NamedTuple):
    value: object


class Quantize(NamedTuple):
    value: object
    bits: int
    position: int


class Plan:
    def __init__(s):
        s.steps = []
        s.ins = []
        s.outs = []
        s.finite = True

    def input(s, shape, dtype):
        v = Value(shape, dtype, "in")
        s.ins.append(v)
        return v

    def output(s, shape, dtype):
        v = Value(shape, dtype, "out")
        s.outs.append(v)
        return v

    def value(s, shape, dtype):
        return Value(shape, dtype, "mid")

    def finish(s):
        pass

    def chain(s, y, chain):
        ch = lambda t: t if not isinstance(t, torch.Tensor) else t.view(-1, *[1] * (y.dim() - 2))
        for st in chain:
            if isinstance(st, Multiply):
                y = y * ch(st.factors)
            elif isinstance(st, Add):
                y = y + ch(st.terms)
            elif isinstance(st, AddValue):
                y = y + st.value.t
            elif isinstance(st, Relu):
                y = y.relu()
            elif isinstance(st, LeakyRelu):
                y = F.leaky_relu(y, st.slope)
            elif isinstance(st, Clamp):
                y = y.clamp(st.low, st.high)
            elif isinstance(st, Store):
                assert st.value.shape == tuple(y.shape), (st.value.shape, y.shape)
                st.value.t = y
            else:
                if not y.isfinite().all():
                    s.finite = False
                assert st.value.shape == tuple(y.shape)
                st.value.t = (y.double() * 2.0**-st.position).round().clamp(-128, 127).to(torch.int8)

    def product(s, source, weight, chain, *, stride, padding, dilation, groups=1):
        def f():
            if weight.dim() == 2:
                y = source.t.double() @ weight.double().t()
            else:
                y = F.conv2d(source.t.double(), weight.double(), None, stride, padding, dilation, groups)
            if len(chain) and isinstance(chain[-1], (Store, Quantize)) and chain[-1].value.shape != tuple(y.shape):
                y = y.flatten(1)
            s.chain(y.float(), chain)

        s.steps.append(f)

    def elements(s, source, chain):
        s.steps.append(lambda: s.chain(source.t, chain))

    def max_pool(s, source, target, k, st, p, d):
        def f():
            target.t = F.max_pool2d(source.t.float(), k, st, p, d, ceil_mode=False).to(source.dtype)
            assert tuple(target.t.shape) == target.shape

        s.steps.append(f)

    def concatenate(s, sources, target):
        def f():
            target.t = torch.cat([v.t for v in sources], 1)

        s.steps.append(f)

    def upsample_nearest(s, source, target):
        def f():
            target.t = F.interpolate(source.t.float(), size=target.shape[2:], mode="nearest").to(source.dtype)

        s.steps.append(f)

    def run(s, inputs, outputs):
        s.finite = True
        for v, t in zip(s.ins, inputs):
            v.t = t.reshape(v.shape)
        for f in s.steps:
            f()
        for v, t in zip(s.outs, outputs):
            t.copy_(v.t.reshape(t.shape))
        return s.finite
