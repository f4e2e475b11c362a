"""torch.einsum and torch.tensordot: drawn equations against torch's, and which of them reach the core."""

import pytest
import torch
from calls import Calls, assert_close, float_and_core, places, run
from hypothesis import given, settings
from hypothesis import strategies as st

import cnmix

SIZES = {"a": 2, "b": 3, "c": 2, "d": 4, "e": 3, "F": 2}


@st.composite
def equations(draw):
    """Draws an equation of two or three operands, and their shapes."""
    names = st.lists(st.sampled_from(sorted(SIZES)), min_size=1, max_size=4, unique=True)
    terms = [draw(names) for _ in range(draw(st.integers(2, 3)))]
    ellipsis = draw(st.booleans())
    shapes, written = [], []
    for term in terms:
        # A dimension of size 1 is broadcast.
        shape = [1 if draw(st.integers(0, 9)) == 0 else SIZES[name] for name in term]
        dots = ellipsis and draw(st.booleans())
        at = draw(st.integers(0, len(term)))
        if dots:
            shape[at:at] = draw(st.sampled_from([(), (5,), (1, 5), (3, 5), (3, 1)]))
        written.append("".join([*term[:at], *(["..."] if dots else []), *term[at:]]))
        shapes.append(tuple(shape))
    equation = ",".join(written)
    if draw(st.booleans()):
        known = sorted({name for term in terms for name in term})
        kept = draw(st.lists(st.sampled_from(known), max_size=3, unique=True))
        if "..." in equation:
            kept.insert(draw(st.integers(0, len(kept))), "...")
        equation += "->" + "".join(kept)
    return equation, shapes


@settings(deadline=None, max_examples=150)
@given(drawn=equations())
def test_drawn_equations_are_torchs(drawn):
    equation, shapes = drawn
    float32, core, _ = float_and_core(lambda *operands: torch.einsum(equation, *operands), *shapes)
    if isinstance(float32[0], str):
        assert core == float32
    else:
        assert_close(core, float32)


PRODUCTS = {
    "ij,jk->ik": ((5, 4), (4, 3)),
    "ij,jk": ((5, 4), (4, 3)),
    "bij,bjk->bki": ((2, 5, 4), (2, 4, 3)),
    "...ij,...jk->...ik": ((2, 5, 4), (1, 4, 3)),
    "bhid,bhjd->bhij": ((2, 3, 5, 4), (2, 3, 6, 4)),
    "ijz,jk->ik": ((5, 4, 2), (4, 3)),
    " i j , j k -> i k ": ((5, 4), (4, 3)),
    "ij,Jj->Ji": ((5, 4), (3, 4)),
    "i,i->": ((4,), (4,)),
}


@pytest.mark.parametrize("equation", PRODUCTS)
def test_one_product_on_the_core(equation):
    float32, core, found = float_and_core(lambda a, b: torch.einsum(equation, a, b), *PRODUCTS[equation])
    assert len(found) == 1
    assert_close(core, float32)


def test_several_products_go_from_left_to_right():
    shapes = (5, 4), (4, 3), (3, 6), (6,)
    float32, core, found = float_and_core(lambda *operands: torch.einsum("ij,jk,kl,l->i", *operands), *shapes)
    assert [name.rpartition(":")[2] for name in found] == [f"einsum.{n}(operands.{n + 1})" for n in range(3)]
    assert_close(core, float32)


FORMS = {
    "a list": lambda a, b: torch.einsum("ij,jk->ik", [a, b]),
    "numbers": lambda a, b: torch.einsum(a, [0, 1], b, [1, 2], [0, 2]),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_arguments(form):
    model = Calls(FORMS[form], (5, 4), (4, 3))
    cnmix.initialize(model)
    run(model)
    assert len(places(model)) == 1


@pytest.mark.parametrize(
    "equation",
    ["ij,jk->iik", "ij,jk->iz", "ij,jk,", "ij,jk,kl", "..ij,jk->ik", "i1,1k", "ij,lk->i->k", "ijj,jk", "i,jk"],
)
def test_wrong_equations_are_torchs_to_refuse(equation):
    float32, core, found = float_and_core(lambda a, b: torch.einsum(equation, a, b), (5, 4), (4, 3))
    assert isinstance(float32[0], str)
    assert core == float32
    assert not found


@pytest.mark.parametrize("equation", ["ii,ij->j", "ij,ij->ij", "ij,kl->ik", "ij,kl->ijkl"])
def test_diagonals_and_what_sums_nothing_stay_float(equation):
    float32, core, found = float_and_core(lambda a, b: torch.einsum(equation, a, b), (4, 4), (4, 4))
    assert not found
    assert_close(core, float32)
