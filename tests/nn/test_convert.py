import copy
import pickle

import pytest
import torch
from torch import nn

from cnmix import QuantizeConfig
from cnmix.nn import QuantizedConv2d, QuantizedLinear, convert, convertible_modules, quantized_modules
from cnmix.rules import leave_out

CONFIG = QuantizeConfig()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
        self.encoder = nn.ModuleDict({"fc1": nn.Linear(8, 8), "fc10": nn.Linear(8, 8)})
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x).flatten(1)
        return self.head(self.encoder["fc10"](self.encoder["fc1"](x)))


ALL = ["stem.0", "encoder.fc1", "encoder.fc10", "head"]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight


def kinds(model):
    return {fqn: type(module) for fqn, module in model.named_modules()}


def images(n=2):
    return torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def test_objects_and_keys_stay():
    model = Net()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    keys = {name: (value.dtype, value.shape) for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert convert(model, CONFIG) == ALL
    assert all(module is modules[name] for name, module in model.named_modules())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert {name: (value.dtype, value.shape) for name, value in model.state_dict().items()} == keys
    assert [fqn for fqn, _ in quantized_modules(model)] == ALL
    before = model.head.weight.clone()
    model(images()).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.head.weight)
    Net().load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(Net().state_dict(), strict=True)


def test_conversion_is_idempotent():
    model = Net()
    convert(model, CONFIG)
    model(images()).sum().backward()
    quantizers = {fqn: module.quantizers for fqn, module in quantized_modules(model)}
    states = {fqn: each.state_dict() for fqn, each in quantizers.items()}
    assert convert(model, CONFIG.replace(bitwidth=16)) == []
    assert all(module.quantizers is quantizers[fqn] for fqn, module in quantized_modules(model))
    assert {fqn: module.quantizers.state_dict() for fqn, module in quantized_modules(model)} == states


def test_convertible_modules_changes_nothing():
    model = Net()
    before = kinds(model)
    assert convertible_modules(model) == {fqn: model.get_submodule(fqn) for fqn in ALL}
    assert kinds(model) == before
    assert not any(quantized_modules(model))


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ([], ALL),
        (["head"], ALL[:3]),
        (["encoder"], ["stem.0", "head"]),
        (["encoder.fc1"], ["stem.0", "encoder.fc10", "head"]),
        (["stem", "head"], ["encoder.fc1", "encoder.fc10"]),
        (["*.fc1"], ["stem.0", "encoder.fc10", "head"]),
        (["*.fc*"], ["stem.0", "head"]),
        (["enc*"], ["stem.0", "head"]),
        (["encoder.fc?"], ["stem.0", "encoder.fc10", "head"]),
        (("stem.0",), ALL[1:]),
        (["stem.1"], ALL),
        (["*"], []),
    ],
)
def test_exclude(exclude, left):
    model = Net()
    assert convert(model, CONFIG, leave_out(exclude)) == left
    assert [fqn for fqn, _ in quantized_modules(model)] == left
    assert model(images()).shape == (2, 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("haed", "'haed': did you mean 'head'"),
        ("encoder.fc11", r"'encoder.fc11': did you mean 'encoder\.fc10?'"),
        ("head.weight", "'head.weight'"),
        ("Head", "'Head': did you mean 'head'"),
        ("qqqqqqqqqqqq", "'qqqqqqqqqqqq'.*named_modules"),
        ("zz*", r"'zz\*'"),
    ],
)
def test_unknown_exclude_names_the_nearest(wrong, message):
    model = Net()
    before = kinds(model)
    with pytest.raises(ValueError, match=message):
        convert(model, CONFIG, leave_out(["stem", wrong]))
    assert kinds(model) == before


def test_exclude_takes_no_single_string():
    with pytest.raises(TypeError, match=r"'head': write \['head'\]"):
        convert(Net(), CONFIG, leave_out("head"))


@pytest.mark.parametrize(("make", "kind"), [(lambda: nn.Linear(4, 3), QuantizedLinear)])
def test_the_root_itself(make, kind):
    model = make()
    assert convert(model, CONFIG) == [""]
    assert type(model) is kind
    assert list(model.state_dict()) == ["weight", "bias"]
    assert model(torch.ones(2, 4)).shape == (2, 3)


def test_copies_and_pickles_work_apart():
    model = Net()
    convert(model, CONFIG)
    model(images()).sum().backward()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kinds(other) == kinds(model)
        for (fqn, ours), (name, theirs) in zip(quantized_modules(model), quantized_modules(other), strict=True):
            assert fqn == name
            assert ours.quantizers.state_dict() == theirs.quantizers.state_dict()
        before = model.head.quantizers.state_dict()
        assert torch.equal(copy.deepcopy(model)(images()), other(images()))
        other(images() * 9).sum().backward()
        assert model.head.quantizers.state_dict() == before


def test_hooks_survive():
    model, seen = Net(), []
    model.head.register_forward_hook(lambda *_: seen.append("forward"))
    model.head.register_forward_pre_hook(lambda *_: seen.append("pre"))
    model.head.register_full_backward_hook(lambda *_: seen.append("backward"))
    model.head.weight.register_hook(lambda _: seen.append("gradient"))
    convert(model, CONFIG)
    model(images()).sum().backward()
    assert sorted(seen) == ["backward", "forward", "gradient", "pre"]


def test_a_weight_may_be_shared_with_an_embedding():
    model = Tied()
    assert convert(model, CONFIG) == ["body", "head"]
    assert model.head.weight is model.embedding.weight


def test_a_weight_shared_with_an_excluded_module_is_refused():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    with pytest.raises(ValueError, match=r"'b' shares a parameter with 'a' \(Linear\)"):
        convert(model, CONFIG, leave_out(["a"]))
    assert not any(quantized_modules(model))
    assert convert(model, CONFIG) == ["a", "b"]


def test_a_module_used_twice_is_converted_once():
    linear = nn.Linear(4, 4)
    model = nn.Sequential(linear, nn.ReLU(), linear)
    assert convert(model, CONFIG) == ["0"]
    model(torch.ones(2, 4)).sum().backward()
    assert linear.quantizers.input.state.step == 2


def test_a_module_used_twice_is_excluded_by_either_name():
    linear = nn.Linear(4, 4)
    model = nn.ModuleDict({"encoder": linear, "decoder": linear})
    assert convert(model, CONFIG, leave_out(["decoder"])) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_other_than_float32_are_refused(dtype):
    model = Net()
    model.head.to(dtype)
    before = kinds(model)
    with pytest.raises(ValueError, match=f"'head' has dtype {dtype}"):
        convert(model, CONFIG)
    assert kinds(model) == before
    assert convert(model, CONFIG, leave_out(["head"])) == ALL[:3]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_module_that_ran_is_an_ordinary_one():
    model = nn.Sequential(nn.LazyConv2d(2, 3))
    model(images())
    assert convert(model, CONFIG) == ["0"]
    assert type(model[0]) is QuantizedConv2d


def test_other_modules_stay():
    model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.LayerNorm(4), nn.Embedding(4, 4))
    before = kinds(model)
    assert convert(model, CONFIG) == []
    assert kinds(model) == before


def test_other_placeholders_of_parameters_are_kept():
    model = nn.Linear(4, 3, bias=False)
    convert(model, CONFIG)
    assert model.bias is None
    assert [name for name, _ in model.named_parameters()] == ["weight"]
    assert not list(model.buffers())
    assert model.apply(lambda module: None) is model
    assert model.train().eval().requires_grad_(False).weight.requires_grad is False
