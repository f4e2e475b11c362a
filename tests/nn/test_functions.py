"""Each function that multiplies: on the core to the bit, with torch's arguments and errors; what stays float."""

import pytest
import torch
import torch.nn.functional as F
from calls import INT8, Calls, assert_close, float_and_core, places, product_of_integers, run
from torch import nn

import cnmix

PRODUCTS = {
    "matrices": (lambda a, b: a @ b, (5, 4), (4, 3)),
    "vector by matrix": (torch.matmul, (4,), (4, 3)),
    "matrix by vector": (torch.matmul, (5, 4), (4,)),
    "batch by vector": (torch.matmul, (2, 5, 4), (4,)),
    "vector by batch": (torch.matmul, (4,), (2, 4, 3)),
    "batch by matrix": (torch.matmul, (2, 3, 5, 4), (4, 3)),
    "batches": (torch.Tensor.matmul, (2, 3, 5, 4), (2, 3, 4, 6)),
    "one column": (torch.matmul, (5, 4), (4, 1)),
    "one row": (torch.matmul, (1, 4), (4, 3)),
    "transposed views": (lambda a, b: a.mT @ b.mT, (2, 4, 5), (2, 3, 4)),
    "permuted batch": (lambda a, b: a.permute(1, 0, 2) @ b.permute(1, 2, 0), (5, 2, 4), (3, 2, 4)),
    "linalg": (torch.linalg.matmul, (5, 4), (4, 3)),
    "mm": (torch.mm, (5, 4), (4, 3)),
    "mv": (torch.mv, (5, 4), (4,)),
    "bmm": (lambda a, b: a.bmm(mat2=b), (2, 5, 4), (2, 4, 3)),
    "linear": (F.linear, (2, 5, 4), (3, 4)),
    "linear of a vector": (F.linear, (4,), (3, 4)),
    "tensordot": (torch.tensordot, (5, 3, 4), (3, 4, 2)),
    "tensordot of pairs": (lambda a, b: torch.tensordot(a, b, dims=([-1, 0], [0, 2])), (5, 3, 4), (4, 2, 5)),
    "tensordot of a tensor": (lambda a, b: torch.tensordot(a, b, torch.tensor([[1], [0]])), (5, 4, 3), (4, 2)),
    "einsum": (lambda a, b: torch.einsum("bhid,bhjd->bhij", a, b), (2, 3, 5, 4), (2, 3, 6, 4)),
    "conv1d": (F.conv1d, (2, 4, 9), (6, 4, 3)),
    "conv2d": (lambda a, b: F.conv2d(a, b, None, (2, 1), padding=(1, 0)), (2, 4, 6, 7), (6, 4, 3, 2)),
    "conv3d": (lambda a, b: F.conv3d(a, b, stride=[2], dilation=1), (1, 2, 5, 4, 4), (3, 2, 2, 2, 2)),
    "conv2d of an image": (F.conv2d, (4, 6, 7), (6, 4, 3, 2)),
    "conv2d in groups": (lambda a, b: F.conv2d(a, b, groups=2), (2, 4, 6, 7), (6, 2, 3, 3)),
    "conv2d channels last": (
        lambda a, b: F.conv2d(a.to(memory_format=torch.channels_last), b),
        (2, 4, 6, 7),
        (6, 4, 3, 3),
    ),
    "conv2d same": (lambda a, b: F.conv2d(a, b, padding="same", dilation=(1, 2)), (2, 4, 6, 7), (6, 4, 3, 2)),
    "conv2d valid": (lambda a, b: F.conv2d(input=a, weight=b, padding="valid"), (2, 4, 6, 7), (6, 4, 2, 3)),
    "conv_transpose1d": (lambda a, b: F.conv_transpose1d(a, b, None, 2, 0, 1), (2, 4, 5), (4, 3, 3)),
    "conv_transpose2d": (lambda a, b: F.conv_transpose2d(a, b, stride=2, groups=2), (2, 4, 5, 3), (4, 3, 3, 2)),
    "conv_transpose3d": (F.conv_transpose3d, (1, 2, 3, 3, 2), (2, 3, 2, 2, 2)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_int8_is_the_product_of_the_integers_to_the_bit(name):
    model = Calls(*PRODUCTS[name])
    cnmix.initialize(model, **INT8)
    results = run(model)
    assert len(places(model)) == 1
    for ours, expected in zip(results, product_of_integers(PRODUCTS[name][0], *model.operands), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, expected)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_padding_of_even_kernels_has_one_more_behind():
    float32, core, found = float_and_core(lambda a, b: F.conv2d(a, b, padding="same"), (2, 4, 6, 7), (6, 4, 2, 4))
    assert len(found) == 1
    assert_close(core, float32)


SUMS = {
    "broadcast": (torch.matmul, (2, 1, 5, 4), (3, 4, 6)),
    "matrix by batch": (torch.matmul, (5, 4), (2, 4, 3)),
    "expanded": (lambda a, b: a.expand(3, 5, 4) @ b.expand(3, 4, 6), (1, 5, 4), (1, 4, 6)),
    "addmm": (lambda a, b, c: torch.addmm(c, a, b), (5, 4), (4, 3), (3,)),
    "addmm by keyword": (lambda a, b, c: torch.addmm(input=c, mat1=a, mat2=b, beta=0.5, alpha=2), (5, 4), (4, 3), (3,)),
    "addmm of a column": (lambda a, b, c: c.addmm(a, b), (5, 4), (4, 3), (5, 1)),
    "baddbmm": (lambda a, b, c: torch.baddbmm(c, a, b, beta=0.5, alpha=2), (2, 5, 4), (2, 4, 3), (2, 5, 3)),
    "baddbmm broadcast": (lambda a, b, c: c.baddbmm(a, b), (2, 5, 4), (2, 4, 3), (3,)),
    "beta of zero": (lambda a, b: torch.addmm(torch.full((3,), torch.nan), a, b, beta=0), (5, 4), (4, 3)),
    "linear with a bias": (F.linear, (2, 5, 4), (3, 4), (3,)),
    "linear with one bias": (F.linear, (5, 4), (3, 4), (1,)),
    "linear with a bias for each row": (lambda a, b, c: F.linear(a, b, bias=c), (5, 4), (3, 4), (5, 3)),
    "conv2d with a bias": (lambda a, b, c: F.conv2d(a, b, bias=c), (4, 6, 7), (6, 4, 3, 2), (6,)),
    "conv_transpose2d with a bias": (F.conv_transpose2d, (2, 4, 5, 3), (4, 3, 3, 2), (3,)),
    "bilinear": (F.bilinear, (5, 4), (5, 3), (6, 4, 3), (6,)),
    "bilinear in batches": (lambda a, b, c: F.bilinear(a, b, c), (2, 5, 4), (2, 5, 3), (6, 4, 3)),
}


@pytest.mark.parametrize("name", SUMS)
def test_int31_is_float32(name):
    float32, core, found = float_and_core(*SUMS[name])
    assert len(found) == 1
    assert_close(core, float32)


WRONG = {
    "matmul": (torch.matmul, (5, 4), (3, 4)),
    "matmul of batches": (torch.matmul, (2, 5, 4), (3, 4, 6)),
    "mm of a batch": (torch.mm, (2, 5, 4), (4, 3)),
    "bmm": (torch.bmm, (2, 5, 4), (3, 4, 6)),
    "addmm": (lambda a, b, c: torch.addmm(c, a, b), (5, 4), (4, 3), (4,)),
    "addmm of a batch": (lambda a, b, c: torch.addmm(c, a, b), (5, 4), (4, 3), (2, 5, 3)),
    "linear": (F.linear, (5, 4), (3, 5)),
    "linear's bias": (F.linear, (5, 4), (3, 4), (4,)),
    "conv2d's channels": (F.conv2d, (2, 3, 6, 6), (6, 4, 3, 3)),
    "conv2d's bias": (F.conv2d, (2, 4, 6, 6), (6, 4, 3, 3), (5,)),
    "conv2d's kernel": (F.conv2d, (2, 4, 2, 2), (6, 4, 3, 3)),
    "conv2d's stride": (lambda a, b: F.conv2d(a, b, stride=0), (2, 4, 6, 6), (6, 4, 3, 3)),
    "conv2d's strides": (lambda a, b: F.conv2d(a, b, stride=(1, 1, 1)), (2, 4, 6, 6), (6, 4, 3, 3)),
    "conv2d's dilation": (lambda a, b: F.conv2d(a, b, dilation=0), (2, 4, 6, 6), (6, 4, 3, 3)),
    "conv2d's padding": (lambda a, b: F.conv2d(a, b, padding="some"), (2, 4, 6, 6), (6, 4, 3, 3)),
    "conv2d's negative padding": (lambda a, b: F.conv2d(a, b, padding=-1), (2, 4, 6, 6), (6, 4, 3, 3)),
    "conv2d same with strides": (lambda a, b: F.conv2d(a, b, None, 2, "same"), (2, 4, 6, 6), (6, 4, 3, 3)),
    "conv2d's groups": (lambda a, b: F.conv2d(a, b, groups=2), (2, 4, 6, 6), (5, 2, 3, 3)),
    "conv_transpose2d's output_padding": (
        lambda a, b: F.conv_transpose2d(a, b, output_padding=3),
        (2, 4, 6, 6),
        (4, 3, 3, 3),
    ),
    "conv_transpose2d's padding": (lambda a, b: F.conv_transpose2d(a, b, padding=3), (2, 4, 2, 2), (4, 3, 3, 3)),
    "bilinear": (F.bilinear, (5, 4), (5, 3), (6, 3, 3)),
    "tensordot": (torch.tensordot, (5, 3, 4), (3, 5, 2)),
    "tensordot's pairs": (lambda a, b: torch.tensordot(a, b, dims=([1, 1], [0, 0])), (5, 4), (4, 3)),
    "tensordot's dimension": (lambda a, b: torch.tensordot(a, b, dims=([5], [0])), (5, 4), (4, 3)),
    "float64": (lambda a, b: a.double() @ b, (5, 4), (4, 3)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_torchs_to_refuse(name):
    float32, core, found = float_and_core(*WRONG[name])
    assert isinstance(float32[0], str)
    assert core == float32
    assert not found


FLOAT = {
    "nothing summed": (torch.matmul, (5, 1), (1, 4)),
    "two vectors": (torch.matmul, (4,), (4,)),
    "float64": (lambda a, b: (a.double() @ b.double()).float(), (5, 4), (4, 3)),
    "constants": (lambda a, b: a @ b + torch.arange(20.0).view(5, 4) @ torch.ones(4, 3), (5, 4), (4, 3)),
    "integers": (lambda a, b: a @ b + (torch.ones(5, 4).long() @ torch.ones(4, 3).long()), (5, 4), (4, 3)),
    "sparse": (lambda a, b: torch.eye(5).to_sparse() @ (a @ b), (5, 4), (4, 3)),
    "empty": (lambda a, b: a @ b + (a[:0].t() @ a[:0]).sum(), (5, 4), (4, 3)),
}


@pytest.mark.parametrize("name", FLOAT)
def test_what_stays_float(name):
    float32, core, found = float_and_core(*FLOAT[name])
    assert len(found) == (name in ("constants", "integers", "sparse", "empty"))
    assert_close(core, float32)


def test_out_stays_float():
    model = Calls(lambda a: torch.mm(a.detach(), a.detach().t(), out=torch.empty(5, 5)) + a.sum(), (5, 4))
    cnmix.initialize(model)
    assert torch.equal(
        model().detach(), model.operands[0].detach() @ model.operands[0].detach().t() + model.operands[0].sum()
    )


def test_transforms_stay_float():
    def gradient(a, b):
        return torch.func.grad(lambda x: (x @ b).square().sum())(a)

    float32, core, found = float_and_core(gradient, (5, 4), (4, 3), **INT8)
    assert not found
    assert torch.equal(core[0], float32[0])


def test_outside_of_modules_and_in_float_models_nothing_changes():
    model = Calls(torch.matmul, (5, 4), (4, 3))
    cnmix.initialize(model, **INT8)
    run(model)
    a, b = model.operands
    assert not torch.equal(model(), a @ b)
    assert torch.equal(Calls(torch.matmul, (5, 4), (4, 3))(), a @ b)


def test_half_activations():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.first(x)
            self.dtypes = x.dtype, (x @ x.t()).dtype
            return self.last(x @ x.t() @ x)

    torch.manual_seed(0)
    model = Halves()
    cnmix.initialize(model, opt_level="O2")
    model(torch.randn(5, 4)).sum().backward()
    assert model.dtypes == (torch.bfloat16, torch.bfloat16)
    assert len(places(model)) == 3


def test_stochastic_rounding_differs_from_step_to_step_and_is_repeatable():
    def train():
        torch.manual_seed(0)
        model = Calls(lambda a, b, c: a @ b @ c, (5, 4), (4, 3), (3, 6))
        cnmix.initialize(model, rounding="stochastic", **INT8)
        return [run(model) for _ in range(3)]

    first, again = train(), train()
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    assert not torch.equal(first[0][0], first[1][0])
