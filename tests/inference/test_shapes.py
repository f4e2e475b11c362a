"""What the rules say of operators, against what these return."""

import itertools

import pytest
import torch

from cnmix.inference.allowed import bound_arguments
from cnmix.inference.program import Ref, find_operator, resolved
from cnmix.inference.shapes import broadcast, returned_by_rule

X = torch.zeros(2, 4, 8, 6)
T = torch.zeros(2, 5, 4)
MASK = torch.zeros(5, 4, dtype=torch.bool)
C = torch.ones(4)
CALLS = [
    ("relu.default", [X]), ("clamp.default", [X, 0.0, None]), ("gelu.default", [T]), ("pow.Tensor_Scalar", [X, 2]),
    ("add.Tensor", [X, C.view(-1, 1, 1)]), ("mul.Tensor", [X, 0.5]), ("mul.Tensor", [T.half(), 2.5]),
    ("sub.Tensor", [T, C]),
    ("add.Tensor", [T.half(), C]), ("add.Tensor", [T.half(), torch.tensor(1.0)]), ("div.Tensor", [T, T.double()]),
    ("rsub.Scalar", [T, 1.0]), ("eq.Tensor", [T, C]), ("lt.Scalar", [T, 1]), ("masked_fill.Scalar", [T, MASK, 0.0]),
    ("cat.default", [[X, X[:, :1]], 1]), ("cat.default", [[X, X], -1]), ("stack.default", [[T, T, T], 1]),
    ("stack.default", [[T, T], -1]), ("mean.dim", [X, [2, 3]]), ("mean.dim", [X, [-1], True]),
    ("adaptive_avg_pool2d.default", [X, [1, 1]]), ("adaptive_avg_pool2d.default", [X[0], [2, 3]]),
    ("max_pool2d.default", [X, [2, 2]]), ("max_pool2d.default", [X, [3, 2], [2, 1], [1, 0]]),
    ("max_pool2d.default", [X, 3, 1, 1, 2]), ("max_pool2d.default", [X, [2], [3]]),
    ("layer_norm.default", [T, [4], C, C]),
    ("layer_norm.default", [T, [5, 4]]), ("group_norm.default", [X, 2, C, C]), ("prelu.default", [X, C]),
    ("batch_norm.default", [X, C, C, C, C, False, 0.1, 1e-5, False]),
    ("scaled_dot_product_attention.default", [T, T[:, :3], T[:, :3]]),
    ("scaled_dot_product_attention.default", [T, T, T, torch.zeros(5, 5)]),
]  # fmt: skip


@pytest.mark.parametrize(("operator", "arguments"), CALLS)
def test_rules(operator, arguments):
    name = f"aten.{operator}"
    tensors = {}

    def named(value):
        if isinstance(value, list):
            return [named(each) for each in value]
        if isinstance(value, torch.Tensor):
            tensors[f"t{len(tensors)}"] = value
            return Ref(f"t{len(tensors) - 1}")
        return value

    bound = bound_arguments(name, named(arguments), {})
    meta = {key: value.to("meta") for key, value in tensors.items()}
    (found,) = returned_by_rule(name, resolved(bound, meta))
    expected = find_operator(name)(*arguments)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


def test_broadcast():
    shapes = [(), (1,), (3,), (2, 3), (2, 1), (0, 3), (0,), (1, 1, 3)]
    for pair in itertools.product(shapes, repeat=2):
        try:
            expected = torch.broadcast_shapes(*pair)
        except RuntimeError:
            with pytest.raises(ValueError, match="do not go together"):
                broadcast(*pair)
        else:
            assert broadcast(*pair) == tuple(expected)
