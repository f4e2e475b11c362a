"""One layer over a sequence, bit for bit against its definition: products of ``reference``, gates by autograd."""

import copy

import pytest
import torch
from torch import nn

from cnmix import QuantizeConfig
from cnmix.adaptive import OperandQuantizer
from cnmix.fixed_point import FixedPoint, absmax, choose_position
from cnmix.kernels import reference
from cnmix.nn import convert, quantizers_of

# A multiple of the processor's vectors: at the end of a row torch may compute sigmoid and tanh with other last digits.
HIDDEN, INPUT, PROJECTED = 32, 24, 16

MODULES = {
    "lstm": lambda: nn.LSTM(INPUT, HIDDEN),
    "lstm without bias": lambda: nn.LSTM(INPUT, HIDDEN, bias=False),
    "projections": lambda: nn.LSTM(INPUT, HIDDEN, proj_size=PROJECTED),
    "gru": lambda: nn.GRU(INPUT, HIDDEN),
    "tanh": lambda: nn.RNN(INPUT, HIDDEN),
    "relu": lambda: nn.RNN(INPUT, HIDDEN, nonlinearity="relu"),
}
SETTINGS = {
    "update every time": {"max_bitwidth": 8},
    "update every other time": {"max_bitwidth": 8, "mode": "fixed_interval", "interval": 2, "quantify_rate": 0.0},
    "wider": {"threshold": 1e-3},
}


class Reference:
    """One layer in one direction, with the quantizers of its own that the module's must agree with."""

    def __init__(self, module, config, direction):
        self.module, self.direction = module, direction
        self.quantizers = {
            place: {name: OperandQuantizer(each.config, "matmul", name, each.state.seed) for name, each in quantizers}
            for place, quantizers in quantizers_of(module)
            if place.startswith(f"l0{direction}.")
        }

    def of(self, product, operand):
        return self.quantizers[f"l0{self.direction}.{product}"][operand]

    def parameter(self, name):
        return getattr(self.module, f"{name}_l0{self.direction}", None)

    def quantize_steps(self, quantizer, parts):
        """Yields each time step's operand, and at last all of them as one; ``parts`` is told each part's place."""
        state = quantizer.state
        fits, stream = quantizer.due, state.step + 1
        done = {}
        for start in iter(parts.pop, None):
            x = parts.value
            position = choose_position(absmax(x), state.bits) if fits else state.position
            seed, first = state.seed, start * x.shape[1]
            values = reference.quantize(
                x, state.bits, position, quantizer.config.rounding, seed=seed, stream=stream, start=first
            )
            done[start] = (x, values)
            yield FixedPoint(values, state.bits, position)
        rows = [done[start] for start in sorted(done)]
        whole = torch.cat([x for x, _ in rows])
        if fits:
            yield quantizer(whole, True)
        else:
            quantizer.state.step += 1
            yield FixedPoint(torch.cat([values for _, values in rows]), state.bits, state.position)


class Parts:
    """Hands the tensor of a time step to the generator above."""

    def __init__(self, reference, quantizer):
        self.value, self.start = None, None
        self._results = reference.quantize_steps(quantizer, self)

    def pop(self):
        return self.start

    def __call__(self, x, start):
        self.value, self.start = x.clone(), start
        return next(self._results)

    def whole(self):
        self.start = None
        return next(self._results)


def times(a, b, b_transposed=False, a_transposed=False):
    a = a._replace(values=a.values.t()) if a_transposed else a
    return reference.matmul(a, b._replace(values=b.values.t()) if b_transposed else b)


def plus(x, bias):
    return x if bias is None else x + bias


def gate_math(module, x, h_product, h, c):
    """The equations of torch's documentation."""
    if isinstance(module, nn.LSTM):
        i, f, g, o = (x + h_product).chunk(4, 1)
        c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
        return o.sigmoid() * c.tanh(), c
    if isinstance(module, nn.GRU):
        (xr, xz, xn), (hr, hz, hn) = x.chunk(3, 1), h_product.chunk(3, 1)
        n = torch.addcmul(xn, (xr + hr).sigmoid(), hn).tanh()
        return torch.addcmul(n, (xz + hz).sigmoid(), h - n), c
    total = x + h_product
    return (total.relu() if module.nonlinearity == "relu" else total.tanh()), c


def run_reference(layer, x, h_0, c_0, sizes, grad_y, grad_h, grad_c):
    """Returns outputs and gradients of one training step."""
    module = layer.module
    projected = layer.parameter("weight_hr") is not None
    qx = layer.of("input", "input")(x, True)
    qw_input = layer.of("input", "weight")(layer.parameter("weight_ih"), True)
    qw_hidden = layer.of("hidden", "weight")(layer.parameter("weight_hh"), True)
    qw_projection = layer.of("projection", "weight")(layer.parameter("weight_hr"), True) if projected else None
    from_input = plus(times(qx, qw_input, b_transposed=True), layer.parameter("bias_ih"))
    starts = [sum(sizes[:t]) for t in range(len(sizes))]
    steps = list(zip(starts, sizes, strict=True))[:: -1 if layer.direction else 1]
    h, c, y = h_0.clone(), c_0.clone(), torch.zeros(len(x), h_0.shape[1])
    hiddens = Parts(layer, layer.of("hidden", "input"))
    projections = Parts(layer, layer.of("projection", "input")) if projected else None
    graphs = {}
    for start, n in steps:
        with torch.no_grad():
            product = plus(times(hiddens(h[:n], start), qw_hidden, b_transposed=True), layer.parameter("bias_hh"))
        leaves = [
            each.detach().clone().requires_grad_() for each in (from_input[start : start + n], product, h[:n], c[:n])
        ]
        out, c_next = gate_math(module, *leaves)
        graphs[start] = leaves, out, c_next
        out = out.detach()
        if projected:
            out = times(projections(out, start), qw_projection, b_transposed=True)
        h[:n], c[:n], y[start : start + n] = out, c_next.detach(), out
    qh = hiddens.whole()
    qp = projections.whole() if projected else None

    dh, dc = grad_h.clone(), grad_c.clone()
    d_input, d_hidden = torch.zeros_like(from_input), torch.zeros_like(from_input)
    gradients = Parts(layer, layer.of("hidden", "grad_output"))
    outer = Parts(layer, layer.of("projection", "grad_output")) if projected else None
    for start, n in reversed(steps):
        rows = slice(start, start + n)
        leaves, out, c_next = graphs[start]
        gradient = dh[:n] + grad_y[rows]
        if projected:
            gradient = times(outer(gradient, start), qw_projection)
        roots = [(out, gradient)] + ([(c_next, dc[:n])] if isinstance(module, nn.LSTM) else [])
        found = torch.autograd.grad([a for a, _ in roots], leaves, [b for _, b in roots], allow_unused=True)
        d_input[rows], d_hidden[rows] = found[0], found[1]
        dh[:n] = times(gradients(d_hidden[rows], start), qw_hidden)
        if found[2] is not None:
            dh[:n] += found[2]
        if isinstance(module, nn.LSTM):
            dc[:n] = found[3]
    qg = gradients.whole()
    qg_input = layer.of("input", "grad_output")(d_input, True)
    weights = {"weight_ih": times(qg_input, qx, a_transposed=True), "weight_hh": times(qg, qh, a_transposed=True)}
    if projected:
        weights["weight_hr"] = times(outer.whole(), qp, a_transposed=True)
    if layer.parameter("bias_ih") is not None:
        weights["bias_ih"], weights["bias_hh"] = d_input.sum(0), d_hidden.sum(0)
    return y, h, c, times(qg_input, qw_input), dh, dc, weights


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [4, 3, 3, 1]], ids=["equal lengths", "packed"])
def test_bits_are_those_of_the_definition(kind, settings, rounding, sizes):
    torch.manual_seed(0)
    module = MODULES[kind]()
    check_steps(module, QuantizeConfig(**SETTINGS[settings], rounding=rounding), sizes, "")


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_bits_of_the_reverse_direction(kind):
    torch.manual_seed(0)
    module = type(MODULES[kind]())(INPUT, HIDDEN, bidirectional=True)
    check_steps(module, QuantizeConfig(max_bitwidth=8), [4, 3, 3, 1], "_reverse")


def check_steps(module, config, sizes, direction):
    convert(module, config)
    layer = Reference(copy.deepcopy(module), config, direction)
    is_lstm, h_size = isinstance(module, nn.LSTM), getattr(module, "proj_size", 0) or HIDDEN
    for step in range(4):
        with torch.no_grad():  # the integers of a weight are kept as long as it is the same
            for ours, theirs in zip(module.parameters(), layer.module.parameters(), strict=True):
                theirs.copy_(ours.mul_(1.01))
        x = draw(sum(sizes), INPUT, seed=step) * 2.0**step
        h_0, c_0 = draw(sizes[0], h_size, seed=10 + step), draw(sizes[0], HIDDEN, seed=20 + step)
        grads = (
            draw(sum(sizes), h_size, seed=30 + step),
            draw(sizes[0], h_size, seed=40),
            draw(sizes[0], HIDDEN, seed=50),
        )
        if not is_lstm:
            c_0, grads = torch.zeros_like(c_0), (*grads[:2], torch.zeros_like(c_0))
        expected = run_reference(layer, x, h_0, c_0, sizes, *grads)
        x.requires_grad_(), h_0.requires_grad_(), c_0.requires_grad_()
        module.zero_grad()
        y, h, c = module._run(x, sizes, h_0, c_0 if is_lstm else None, f"l0{direction}", True)
        torch.autograd.backward([y, h, *([c] if is_lstm else [])], list(grads[: 2 + is_lstm]))
        found = {"y": y, "h": h, "x.grad": x.grad, "h_0.grad": h_0.grad}
        theirs = dict(zip(("y", "h", "c", "x.grad", "h_0.grad", "c_0.grad"), expected, strict=False))
        if is_lstm:
            found |= {"c": c, "c_0.grad": c_0.grad}
        for name, value in found.items():
            assert torch.equal(value, theirs[name]), (step, name)
        for name, gradient in expected[-1].items():
            ours = getattr(module, f"{name}_l0{direction}").grad
            if name.startswith("bias"):  # a sum of floats, whose order is the kernel's
                torch.testing.assert_close(ours, gradient, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(ours, gradient), (step, name)
        for place, quantizers in quantizers_of(module):
            if place in layer.quantizers:
                for name, quantizer in quantizers:
                    assert quantizer.state.step == step + 1
                    assert quantizer.state_dict() == layer.quantizers[place][name].state_dict(), (place, name)


@pytest.mark.parametrize("kind", ["lstm", "gru", "projections"])
@pytest.mark.parametrize("width", [8, 16])
def test_a_product_for_each_gate_gives_the_same_bits(kind, width):
    torch.manual_seed(0)
    fused = MODULES[kind]()
    convert(fused, QuantizeConfig(bitwidth=width, max_bitwidth=width))
    apart = copy.deepcopy(fused)
    apart.fused = False
    for step in range(3):
        results = []
        for module in (fused, apart):
            module.zero_grad()
            x = draw(5, 3, INPUT, seed=step).requires_grad_()
            y, _ = module(x)
            y.backward(draw(*y.shape, seed=9))
            results.append([y, x.grad, *(parameter.grad for parameter in module.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_training_is_the_same_for_one_thread_and_two():
    torch.manual_seed(0)
    start = nn.LSTM(INPUT, HIDDEN, 2, bidirectional=True)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        module = copy.deepcopy(start)
        convert(module, QuantizeConfig())
        for step in range(2):
            module.zero_grad()
            module(draw(5, 3, INPUT, seed=step))[0].square().sum().backward()
        results.append([parameter.grad for name, parameter in module.named_parameters() if "weight" in name])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("due", [True, False])
def test_shares_are_those_of_all_time_steps(due):
    module = nn.LSTM(INPUT, HIDDEN)
    convert(module, QuantizeConfig(max_bitwidth=8, mode="fixed_interval", interval=1 if due else 9, quantify_rate=0.0))
    module(draw(5, 3, INPUT, seed=0))[0].sum().backward()
    quantizers = [quantizer for _, each in quantizers_of(module) for _, quantizer in each]
    for quantizer in quantizers:
        quantizer.look_next = True
    x = draw(5, 3, INPUT, seed=1)
    y = module(x)[0]
    y.sum().backward()
    assert not any(quantizer.look_next for quantizer in quantizers)
    hidden = dict(quantizers_of(module))["l0.hidden"].input
    before = torch.cat([torch.zeros(1, 3, HIDDEN), y[:-1].detach()]).flatten(0, 1)
    values = reference.quantize(before, 8, hidden.state.position)
    assert hidden.shares.underflow == (int(before.count_nonzero()) - int(values.count_nonzero())) / before.numel()


# torch.compile looks at the inputs of the graphs that it makes around the LSTM, and silences this outside of tests.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_models_train_to_the_same_bits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUT, INPUT), nn.LSTM(INPUT, HIDDEN))
    convert(model, QuantizeConfig())
    results = []
    for run in (lambda module: module, lambda module: torch.compile(module, backend="eager")):
        trained = copy.deepcopy(model)
        called = run(trained)
        for step in range(2):
            called(draw(5, 3, INPUT, seed=step))[0].square().sum().backward()
        results.append([parameter.grad for parameter in trained.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
