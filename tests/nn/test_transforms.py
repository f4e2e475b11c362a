"""torch.func over converted modules."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, grad_and_value, jacrev, jvp, vjp, vmap

import cnmix

# torch's own, when jacrev and jvp load their decompositions
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def build(**settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3))
    return cnmix.initialize(model, None, **settings)[0]


def images(seed=0):
    return torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def loss(model, parameters, x):
    return functional_call(model, parameters, (x,)).square().mean()


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("settings", [{}, {"threshold": 1e-5}, {"rounding": "stochastic"}])
def test_gradients_of_a_transform_are_those_of_backward(level, settings):
    ours, theirs = build(opt_level=level, **settings), build(opt_level=level, **settings)
    for seed in range(3):
        found, value = grad_and_value(loss, argnums=1)(ours, dict(ours.named_parameters()), images(seed))
        expected = theirs(images(seed)).square().mean()
        theirs.zero_grad()
        expected.backward()
        assert torch.equal(value, expected)
        for name, parameter in theirs.named_parameters():
            assert torch.equal(found[name], parameter.grad)
        with torch.no_grad():
            for model, gradients in ((ours, found.values()), (theirs, [p.grad for p in theirs.parameters()])):
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter -= 0.1 * gradient
    assert cnmix.state_dict(ours) == cnmix.state_dict(theirs)


def test_functional_call_without_a_transform_trains():
    model, other = build(), build()
    loss(model, dict(model.named_parameters()), images()).backward()
    other(images()).square().mean().backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert cnmix.state_dict(model) == cnmix.state_dict(other)


def test_other_weights_than_the_module_has_are_used():
    model, other = build(max_bitwidth=8), build(max_bitwidth=8)
    doubled = {name: 2 * value.detach() for name, value in model.named_parameters()}
    other.load_state_dict(doubled)
    assert torch.equal(functional_call(model, doubled, (images(),)), other(images()))
    model(images())  # its own again
    other.load_state_dict(model.state_dict())
    other(images())
    assert torch.equal(model(images()), other(images()))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_only_what_is_wanted_is_computed(frozen):
    model, other = build(), build()
    wanted = {name: value for name, value in model.named_parameters() if not name.endswith(frozen)}
    found = grad(loss, argnums=1)(model, wanted, images())
    other(images()).square().mean().backward()
    assert all(torch.equal(found[name], other.get_parameter(name).grad) for name in wanted)


def test_vjp_and_gradient_of_the_input():
    model, other = build(), build()
    y, pull = vjp(model, images())
    x = images().requires_grad_()
    expected = other(x)
    expected.backward(torch.ones_like(expected))
    assert torch.equal(pull(torch.ones_like(y))[0], x.grad)


def test_evaluation_within_a_transform_moves_no_statistics():
    model = build().eval()
    model.train()(images()).sum().backward()
    before = copy.deepcopy(cnmix.state_dict(model))
    grad(loss, argnums=1)(model.eval(), dict(model.named_parameters()), images(1))
    assert cnmix.state_dict(model) == before


@pytest.mark.parametrize("transform", [vmap, jacrev])
def test_what_would_have_to_be_batched_is_refused_by_name(transform):
    model = build().eval()
    with pytest.raises(RuntimeError, match=r"'[05]' computes in fixed point, which torch.func.vmap .* cannot batch"):
        transform(model)(images()[None] if transform is vmap else images())


def test_second_and_forward_derivatives_are_refused():
    model = build()
    parameters = dict(model.named_parameters())
    with pytest.raises(RuntimeError, match="computes in fixed point, which has no second derivatives"):
        grad(lambda p: sum(each.sum() for each in grad(loss, argnums=1)(model, p, images()).values()))(parameters)
    with pytest.raises(NotImplementedError, match="forward mode AD"):
        jvp(model, (images(),), (images(),))
