"""The products of integer models: what is said of their results, and what is refused, against what they return."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnmix.inference.checking import check_values
from cnmix.inference.names import CONVOLUTION, FILTER, GROUPED, LINEAR, MATMUL, RECURRENCE, STORED_WEIGHTS
from cnmix.inference.product_checks import check_product
from cnmix.inference.program import Program, Ref, Spec, Step, find_operator
from cnmix.inference.shapes import returned_by_rule
from cnmix.nn.exported import FITTING

FORMAT = st.sampled_from([(8, -5), (16, -9), (31, -20), (8, FITTING), (31, FITTING)])
DTYPE = st.sampled_from([torch.float32, torch.float64, torch.float16])
ROUNDING = st.sampled_from(["nearest_even", "half_up"])
FEW = settings(max_examples=60, deadline=None)
INTEGERS = {8: torch.int8, 16: torch.int16, 31: torch.int32}


def check(operator, arguments):
    """Computes a call, and compares it with what is said of it."""
    schema = find_operator(operator)._schema
    bound = {each.name: value for each, value in zip(schema.arguments, arguments, strict=True)}
    meta = {
        name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        if isinstance(x, torch.Tensor)
        else x
        for name, x in bound.items()
    }
    check_product(operator, meta)
    said = returned_by_rule(operator, meta)
    result = find_operator(operator)(*arguments)
    results = [result] if isinstance(result, torch.Tensor) else result
    assert len(said) == len(results)
    for a, b in zip(said, results, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if b.numel():
            assert [s for s, n in zip(a.stride(), a.shape, strict=True) if n > 1] == [
                s for s, n in zip(b.stride(), b.shape, strict=True) if n > 1
            ]


def weight(draw, shape):
    bits = draw(st.sampled_from([8, 16, 31]))
    return torch.ones(shape, dtype=INTEGERS[bits]), [bits, draw(st.integers(-9, 3))]


@FEW
@given(st.data())
def test_linear(data):
    draw = data.draw
    inputs, outputs = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    x = torch.randn(*draw(st.lists(st.integers(0, 3), max_size=3)), inputs).to(draw(DTYPE))
    w, formats = weight(draw, (outputs, inputs))
    bias = draw(st.sampled_from([None, torch.ones(outputs)]))
    check(LINEAR, [x, w, bias, [*draw(FORMAT), *formats], draw(ROUNDING), draw(st.booleans()), "layer"])


@st.composite
def geometries(draw):
    """An input, the shape of a weight, how many channels it makes, and the arguments of a convolution."""
    spatial = draw(st.integers(1, 3))

    def each(low, high):
        return [draw(st.integers(low, high)) for _ in range(spatial)]

    groups, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    inside, outside = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel, stride, padding, dilation = each(1, 3), each(1, 2), each(0, 1), each(1, 2)
    extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)] if transposed else []
    least = [max(d * (k - 1) + 1 - 2 * p, 1) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = [draw(st.integers(3 if transposed else n, n + 3)) for n in least]
    shape = (groups * inside, outside) if transposed else (groups * outside, inside)
    x = torch.randn(draw(st.integers(1, 2)), groups * inside, *size).to(draw(DTYPE))
    if draw(st.booleans()):  # channels last
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    arguments = [stride, padding, dilation, groups, transposed, extra]
    return x, (*shape, *kernel), groups * outside, arguments


@FEW
@given(geometries(), st.data())
def test_convolution(geometry, data):
    x, shape, outputs, arguments = geometry
    w, formats = weight(data.draw, shape)
    bias = data.draw(st.sampled_from([None, torch.ones(outputs)]))
    check(CONVOLUTION, [x, w, bias, *arguments, [*data.draw(FORMAT), *formats], data.draw(ROUNDING), True, "layer"])


@FEW
@given(geometries(), FORMAT, FORMAT, DTYPE)
def test_filter(geometry, left, right, dtype):
    x, shape, _, arguments = geometry
    check(FILTER, [x, torch.randn(shape).to(dtype), *arguments, [*left, *right], "half_up", "nearest_even", False, ""])


@FEW
@given(st.data())
def test_matmul(data):
    draw = data.draw
    m, k, n = (draw(st.integers(1, 4)) for _ in range(3))
    batch = draw(st.lists(st.integers(1, 3), max_size=3))
    sides = []
    for matrix in ((m, k), (k, n)):
        own = [draw(st.sampled_from([1, size])) for size in batch]
        side = torch.randn(*own[draw(st.integers(0, len(own))) :], *matrix).to(draw(DTYPE))
        sides.append(side.mT.contiguous().mT if draw(st.booleans()) else side)
    per_entry = draw(st.lists(st.booleans(), min_size=2, max_size=2))
    check(MATMUL, [*sides, [*draw(FORMAT), *draw(FORMAT)], per_entry, "nearest_even", "half_up", True, "scores"])


@FEW
@given(st.data())
def test_grouped(data):
    draw = data.draw
    rows, k, n, groups = (draw(st.integers(low, 4)) for low in (0, 1, 1, 1))
    # Any numbers: what they leave out is zeros, and what they ask for beyond the rows is nothing.
    ends = torch.tensor(draw(st.lists(st.integers(-3, 6), min_size=groups, max_size=groups)))
    w, formats = weight(draw, (groups, k, n))
    if draw(st.booleans()):
        w, formats = torch.randn(groups, k, n), [*draw(FORMAT)]
    x = torch.randn(rows, k).to(draw(DTYPE))
    ends = ends.to(draw(st.sampled_from([torch.int32, torch.int64])))
    check(GROUPED, [x, w, ends, [*draw(FORMAT), *formats], "nearest_even", "nearest_even", False, "experts"])


def recurrence(draw):
    mode = draw(st.sampled_from(["LSTM", "GRU", "RNN_TANH", "RNN_RELU"]))
    inputs, size, number = draw(st.integers(1, 4)), draw(st.integers(2, 4)), {"LSTM": 4, "GRU": 3}.get(mode, 1)
    steps = sorted(draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)), reverse=True)
    hidden = draw(st.integers(1, size - 1)) if mode == "LSTM" and draw(st.booleans()) else size
    shapes = [(number * size, inputs), (number * size, hidden)] + ([(hidden, size)] if hidden < size else [])
    weights, formats = zip(*(weight(draw, shape) for shape in shapes), strict=True)
    biases = draw(st.sampled_from([[None, None], [torch.ones(number * size)] * 2]))
    x, h = torch.randn(sum(steps), inputs).to(draw(DTYPE)), torch.zeros(steps[0], hidden)
    c = torch.zeros(steps[0], size) if mode == "LSTM" else None
    flat = [n for each in formats for n in (*draw(FORMAT), *each)]
    ways = [draw(st.booleans()), draw(st.booleans())]
    exact = [draw(st.booleans()) for _ in weights]
    projection = weights[2] if len(weights) == 3 else None
    return [x, *weights[:2], *biases, projection, h, c, mode, steps, *ways, flat,
            ["nearest_even"] * len(weights), exact, "lstm"]  # fmt: skip


@FEW
@given(st.data())
def test_recurrence(data):
    check(RECURRENCE, recurrence(data.draw))


X, W, QUERY = torch.zeros(2, 4), torch.zeros(3, 4, dtype=torch.int8), torch.zeros(2, 3, 4)
IMAGE = torch.zeros(1, 2, 4, 4)
VALID = {
    LINEAR: [X, W, torch.zeros(3), [8, -4, 8, -4], "nearest_even", False, ""],
    MATMUL: [QUERY, QUERY.mT, [8, FITTING, 16, -4], [False, True], "nearest_even", "half_up", False, ""],
    FILTER: [IMAGE, torch.zeros(4, 1, 2, 2), [1, 1], [0, 0], [1, 1], 2, False, [], [8, -4, 8, -4],
             "nearest_even", "nearest_even", False, ""],
    GROUPED: [X, torch.zeros(2, 4, 3, dtype=torch.int8), torch.zeros(2, dtype=torch.int32), [8, -4, 8, -4],
              "nearest_even", "nearest_even", False, ""],
    RECURRENCE: [torch.zeros(5, 4), torch.zeros(12, 4, dtype=torch.int8), torch.zeros(12, 2, dtype=torch.int8), None,
                 torch.zeros(12), torch.zeros(2, 3, dtype=torch.int8), torch.zeros(3, 2), torch.zeros(3, 3), "LSTM",
                 [3, 2], False, True, [8, -4] * 6, ["nearest_even"] * 3, [False] * 3, ""],
}  # fmt: skip
FORMATS = [[8, -4, 8], [8, -4, 8, -4, 8], [7, -4, 8, -4], [8, -129, 8, -4], [8, -4, 8, 128], [8, -4, 9, -4],
           [8, FITTING + 1, 8, -4], [], [8, -4, 8, -FITTING]]  # fmt: skip
HALF, WHOLE = torch.zeros(2, 4, dtype=torch.float16), torch.zeros(2, 4, dtype=torch.int64)
WRONG = {
    LINEAR: {
        0: [torch.zeros(2, 5), WHOLE, torch.zeros(())],
        1: [W.float(), W[0], W[:, :0], W.short()],
        2: [torch.zeros(4), torch.zeros(3).double()],
        3: [*FORMATS, [8, -4, 8, FITTING], [8, -4, 16, -4]],
        4: ["stochastic", "", "x"],
    },
    MATMUL: {
        0: [QUERY[..., :3], QUERY.long(), QUERY[0, 0], torch.zeros(3, 3, 4)],
        1: [QUERY, QUERY.mT.long(), torch.zeros(4)],
        2: FORMATS,
        3: [[], [True], [True] * 3],
        4: ["stochastic"],
        5: ["x"],
    },
    FILTER: {
        0: [IMAGE[0], IMAGE[:, :1], IMAGE.int()],
        1: [torch.zeros(3, 1, 2), torch.zeros(4, 1, 2, 2).int(), torch.zeros(4, 2, 2, 2), torch.zeros(0, 1, 2, 2)],
        2: [[1], [0, 1], [1, 1, 1], [2**40, 1], []],
        3: [[-1, 0], [2**40, 0], [2**30, 2**30]],
        4: [[0, 1], [1]],
        5: [0, -1, 3],
        7: [[1, 0]],
        8: FORMATS,
        9: ["stochastic"],
        10: ["stochastic"],
    },
    GROUPED: {
        0: [X[0], X[:, :3], X.int()],
        1: [W, torch.zeros(2, 5, 3), torch.zeros(2, 4, 3, dtype=torch.int16), torch.zeros(2, 4, 0)],
        2: [torch.zeros(2), torch.zeros(3, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int32),
            torch.zeros(2, dtype=torch.bool)],
        3: [*FORMATS, [8, -4, 8, FITTING]],
        4: ["stochastic"],
        5: ["stochastic"],
    },
    RECURRENCE: {
        0: [torch.zeros(5, 3), torch.zeros(4, 4), torch.zeros(5), torch.zeros(5, 4).int()],
        1: [torch.zeros(12, 4), torch.zeros(9, 4, dtype=torch.int8), torch.zeros(13, 4, dtype=torch.int8)],
        2: [torch.zeros(12, 3, dtype=torch.int8), torch.zeros(16, 2, dtype=torch.int8), W[0], W[:0]],
        3: [torch.zeros(11), torch.zeros(12).double(), torch.zeros(1, 12)],
        4: [torch.zeros(3)],
        5: [None, torch.zeros(3, 2, dtype=torch.int8), torch.zeros(2, 3)],
        6: [torch.zeros(2, 2), torch.zeros(3, 3), torch.zeros(3), torch.zeros(3, 2).half()],
        7: [None, torch.zeros(3, 2), torch.zeros(2, 3), torch.zeros(3, 3).double()],
        8: ["GRU", "lstm", "", "RNN_TANH"],
        9: [[], [5], [3, 1], [2, 3], [3, 2, 0], [4, 1], [3, 3, -1], [3, 2**40]],
        12: [[8, -4] * 4, [8, -4, 8, FITTING] * 3, [9, -4] * 6],
        13: [[], ["nearest_even"] * 2, ["stochastic"] * 3],
        14: [[], [True] * 4],
    },
}  # fmt: skip


@pytest.mark.parametrize("operator", WRONG)
def test_what_does_not_belong_together_is_refused(operator):
    check(operator, VALID[operator])
    names = [each.name for each in find_operator(operator)._schema.arguments]
    for place, values in WRONG[operator].items():
        for value in values:
            bound = {**dict(zip(names, VALID[operator], strict=True)), names[place]: value}
            with pytest.raises(ValueError, match=r"\w{2}"):
                check_product(operator, bound)


def test_integers_of_weights_are_constants_of_their_width():
    for operator, arguments in VALID.items():
        names = [each.name for each in find_operator(operator)._schema.arguments]
        tensors = {name: x for name, x in zip(names, arguments, strict=True) if isinstance(x, torch.Tensor)}
        given = [Ref(name) if name in tensors else value for name, value in zip(names, arguments, strict=True)]
        result = find_operator(operator)(*arguments)
        results = [result] if isinstance(result, torch.Tensor) else result
        made = [f"y{number}" for number in range(len(results))]
        step = Step(operator, given, {}, made)
        for stored in STORED_WEIGHTS[operator]:
            inputs = [name for name in tensors if name == stored]
            constants = {name: x for name, x in tensors.items() if name != stored}
            specs = {name: Spec.of(x) for name, x in (*zip(made, results, strict=True), (stored, tensors[stored]))}
            with pytest.raises(ValueError, match="the weight must be a constant"):
                check_values(Program(inputs, made, [step], constants, specs), [dict(zip(names, given, strict=True))])


def test_rows_of_a_sequence_are_bounded():
    rows = 2**29
    names = [each.name for each in find_operator(RECURRENCE)._schema.arguments]
    bound = dict(zip(names, VALID[RECURRENCE], strict=True))
    bound |= {
        "x": torch.empty(rows, 4, device="meta"), "batch_sizes": [rows], "h": torch.empty(rows, 2, device="meta"),
        "c": torch.empty(rows, 3, device="meta"),
    }  # fmt: skip
    with pytest.raises(ValueError, match="its gates are too large"):
        check_product(RECURRENCE, bound)
    a, b = torch.empty(2**20, 1, 2, 2, device="meta"), torch.empty(2**20, 2, 2, device="meta")
    names = [each.name for each in find_operator(MATMUL)._schema.arguments]
    with pytest.raises(ValueError, match=rf"its operands have {math.prod((2**20, 2**20, 4))} numbers"):
        check_product(MATMUL, dict(zip(names, [a, b, *VALID[MATMUL][2:]], strict=True)))
