"""The names of the places that call functions: one for each way that leads there, stable; and what a module owns."""

import threading

import pytest
import torch
from calls import INT8, places
from torch import nn
from torch.overrides import _get_current_function_mode
from torch.utils.checkpoint import checkpoint

import cnmix


class Weights(nn.Module):
    """Square weights to multiply by, for forward passes of subclasses."""

    def __init__(self, count=2):
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList([torch.randn(4, 4) / 2 for _ in range(count)])


def rows(seed=0):
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))


def places_of(model, steps=1):
    cnmix.initialize(model)
    for seed in range(steps):
        model(rows(seed)).square().mean().backward()
    assert _get_current_function_mode() is None
    return places(model)


def test_lines_and_calls_within_a_line():
    class Model(Weights):
        def forward(self, x):
            v, w = self.weights
            x = torch.matmul(x, v)
            x = x @ v @ w
            return torch.matmul(torch.matmul(x, v), w) + torch.mm(x, w)

    # From the ninth time on Python runs the code otherwise, which must not change the names.
    found = places_of(Model(), steps=20)
    assert found == [
        "..forward+2:matmul(weights.0)",
        "..forward+3:matmul(weights.0)",
        "..forward+3.1:matmul(weights.1)",
        "..forward+4:matmul(weights.0)",
        "..forward+4.1:matmul(weights.1)",
        "..forward+4:mm(weights.1)",
    ]


def test_a_function_has_a_place_for_each_call_of_it():
    class Model(Weights):
        def multiply(self, x, w):
            return x @ w

        def forward(self, x):
            x = self.multiply(x, self.weights[0])
            x = self.multiply(x, self.weights[1]) + self.multiply(x, self.weights[0])
            last = lambda y: y @ self.weights[0]  # noqa: E731
            return last(x) + last(2 * x)

    assert places_of(Model(), steps=20) == [
        "..forward+1>multiply+1:matmul(weights.0)",
        "..forward+2>multiply+1:matmul(weights.1)",
        "..forward+2.1>multiply+1:matmul(weights.0)",
        "..forward+4><lambda>+0:matmul(weights.0)",
        "..forward+4.1><lambda>+0:matmul(weights.0)",
    ]


def test_a_comprehension_is_a_part_of_the_code_around_it():
    """As it is for Python from 3.12 on; a generator is called."""

    class Model(Weights):
        def forward(self, x):
            x = sum([x @ w for w in self.weights])
            several = [
                x @ w
                for w in self.weights
            ]  # fmt: skip
            x = several[0] + several[1]
            return sum(x @ w for w in self.weights)

    found = places_of(Model(), steps=20)
    assert found[:2] == ["..forward+1:matmul(weights.0)", "..forward+1:matmul(weights.1)"]
    assert found[2:4] == ["..forward+3:matmul(weights.0)", "..forward+3:matmul(weights.1)"]
    generated = found[4:]
    assert [name.partition("><genexpr>+0")[2] for name in generated] == [":matmul(weights.0)", ":matmul(weights.1)"]


def test_a_loop_over_parameters_has_a_product_for_each():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.several = nn.ParameterList([torch.randn(8, 8), 30 * torch.randn(8, 8)])
            self.stacked = nn.Parameter(torch.randn(3, 8, 8) * torch.tensor([0.1, 1.0, 20.0])[:, None, None])

        def forward(self, x):
            found = [x @ weight for weight in self.several]
            found += [torch.nn.functional.linear(x, self.stacked[index]) for index in range(3)]
            return torch.stack(found)

    model = Model()
    cnmix.initialize(model, steps_per_epoch=4, **INT8)
    for seed in range(12):  # the schedule measures once an epoch in the end
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
        y = model(x)
        y.sum().backward()
    expected = torch.stack([x @ each for each in (*model.several, *model.stacked.mT)])
    errors = (y - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert errors.max() < 0.03
    assert places(model) == [
        *(f"..forward+1:matmul(several.{index})" for index in range(2)),
        *(f"..forward+2:linear(stacked.{index})" for index in range(3)),
    ]


def test_a_subclass_and_the_forward_that_it_calls_are_two_places():
    class Parent(Weights):
        def forward(self, x):
            return x @ self.weights[0]

    class Child(Parent):
        def forward(self, x):
            return super().forward(x) @ self.weights[1]

    assert places_of(Child()) == ["..forward+1>forward+1:matmul(weights.0)", "..forward+1:matmul(weights.1)"]


def test_loops_and_recursion_have_one_place_however_often_they_run():
    class Model(Weights):
        def descend(self, x, depth):
            return x if depth == 0 else torch.tanh(self.descend(x, depth - 1) @ self.weights[0])

        def forward(self, x, times=1):
            for _ in range(times):
                x = torch.tanh(x @ self.weights[1])
            return self.descend(x, times)

    model = Model()
    cnmix.initialize(model)
    for times in (1, 3, 2):
        model(rows(), times).sum().backward()
    states = cnmix.state_dict(model)["models"][0]["modules"]
    assert {name: state["operands"]["input"]["step"] for name, state in states.items()} == {
        "..forward+2:matmul(weights.1)": 6,
        "..forward+3>descend+1:matmul(weights.0)": 6,
    }


def decorated(forward):
    def wrapper(*args):
        return forward(*args)

    return wrapper


class Block(Weights):
    @decorated
    def forward(self, x):
        return x @ self.weights[0]


class Nested(Weights):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(x @ self.weights[0]) @ self.weights[1]


OUTER = ["..forward+1:matmul(weights.0)", "..forward+1.1:matmul(weights.1)"]


def test_the_innermost_module_owns_a_product_and_decorators_are_no_part_of_the_way():
    assert places_of(Nested()) == [*OUTER, "block..forward+2:matmul(weights.0)"]


@pytest.mark.parametrize(("package", "on_core"), [("lightning", False), ("accelerate", True), ("mine", True)])
def test_a_training_step_in_place_of_the_forward_pass_stays_float(package, on_core):
    """Lightning does that for DDP, and a loss is float without; accelerate wraps a forward pass."""
    code = "def instead(step):\n    def forward(*args):\n        return step(*args)\n    return forward"
    made = {}
    exec(compile(code, f"/lib/site-packages/{package}/strategy.py", "exec"), made)

    class Model(Nested):
        def step(self, x):
            return self.block(x) @ self.weights[0]

        forward = made["instead"](step)

    inside, *own = reversed(places_of(Model()))
    assert inside == "block..forward+2:matmul(weights.0)"
    assert bool(own) == on_core
    assert package != "accelerate" or own == ["..step+1:matmul(weights.0)"]


def test_a_module_that_is_left_out_leaves_its_functions_in_float():
    model = Nested()
    cnmix.initialize(model, exclude=["block"])
    model(rows()).sum().backward()
    assert places(model) == OUTER
    assert not hasattr(model.block, "function_products")


def test_a_forward_pass_called_directly_belongs_to_the_module_that_calls_it():
    class Model(Nested):
        def forward(self, x):
            return self.block.forward(x)

    assert places_of(Model()) == ["..forward+1>wrapper+1>forward+2:matmul(block.weights.0)"]
    model = Nested()
    cnmix.initialize(model)
    x, plain = rows(), Block()
    assert torch.equal(model.block.forward(x), plain(x))  # of no module
    assert not places(model)


class Checkpointed(Weights):
    def __init__(self, reentrant):
        super().__init__(3)
        self.block, self.reentrant = Block(), reentrant

    def part(self, x, scale):
        return self.block(torch.tanh(x @ self.weights[1] * scale)) @ self.weights[2]

    def forward(self, x):
        x = x @ self.weights[0]
        for scale in (1.0, 5.0):
            x = (
                checkpoint(self.part, x, scale, use_reentrant=self.reentrant)
                if self.reentrant is not None
                else self.part(x, scale)
            )
        return x


def trained(reentrant, **settings):
    model = Checkpointed(reentrant)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    torch.manual_seed(0)
    cnmix.initialize(model, optimizer, **settings)
    for seed in range(3):
        optimizer.zero_grad()
        model(rows(seed)).square().mean().backward()
        optimizer.step()
    assert len(places(model)) == 4
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_part_that_is_checkpointed_is_repeated_on_the_core(reentrant):
    # Gradients of a weight add up in another order.
    for ours, plain in zip(trained(reentrant), trained(None), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)


def test_both_kinds_of_checkpointing_draw_the_same_random_numbers():
    for one, other in zip(trained(False, rounding="stochastic"), trained(True, rounding="stochastic"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_generators_end_before_their_code_runs_and_stay_float():
    class Model(Weights):
        def forward(self, x):
            for weight in self.weights:
                yield x @ weight

    model = Model()
    cnmix.initialize(model)
    sum(y.sum() for y in model(rows())).backward()
    assert not places(model)
    assert _get_current_function_mode() is None


@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
@pytest.mark.parametrize("inner", [False, True])
def test_a_failing_hook_ends_the_mode(register, inner):
    model = Nested()
    cnmix.initialize(model)

    def fail(*_):
        raise LookupError

    handle = getattr(model.block if inner else model, register)(fail)
    with pytest.raises(LookupError):
        model(rows())
    assert _get_current_function_mode() is None
    handle.remove()
    model(rows()).sum().backward()
    assert len(places(model)) == 3


def test_nothing_goes_to_a_module_that_was_interrupted():
    model, plain = Nested(), Block()
    cnmix.initialize(model, **INT8)
    model(rows()).sum().backward()
    before = cnmix.state_dict(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.block.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(rows())
    handle.remove()
    # Python leaves such calls without their hooks: torch's mode stays until the model is called again.
    x = rows()
    assert torch.equal(plain(x), x @ plain.weights[0])
    assert torch.equal(x @ plain.weights[0], plain(x))
    expected = cnmix.state_dict(model)["models"][0]["modules"]["block..forward+2:matmul(weights.0)"]
    assert expected == before["models"][0]["modules"]["block..forward+2:matmul(weights.0)"]
    model(rows()).sum().backward()
    assert _get_current_function_mode() is None
    assert len(places(model)) == 3


def test_threads_have_modes_of_their_own():
    model, failures = Nested(), []
    cnmix.initialize(model)
    model(rows()).sum().backward()
    expected = model.eval()(rows())

    def call():
        for _ in range(20):
            if not torch.equal(model(rows()), expected) or _get_current_function_mode() is not None:
                failures.append("differs")

    threads = [threading.Thread(target=call) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failures
