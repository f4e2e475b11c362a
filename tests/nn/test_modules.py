import copy
import math

import pytest
import torch
from torch import nn

from cnmix import QuantizeConfig
from cnmix.nn import OPERANDS, QuantizedConv2d, QuantizedLinear, convert, quantized_modules


def quantized(module, **settings):
    model = nn.Sequential()
    model.add_module("encoder", nn.Sequential(module))
    convert(model, QuantizeConfig(**settings))
    return model


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def states(model):
    return copy.deepcopy({fqn: module.quantizers.state_dict() for fqn, module in quantized_modules(model)})


MODULES = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 3, 2), (5, 4, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 3, 2), (2, 4, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 3, 2), (2, 4, 3, 4, 3)),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_output_and_gradient_have_the_dtype_of_the_input(kind, dtype):
    make, shape = MODULES[kind]
    model = quantized(make())
    x = random(*shape).to(dtype).requires_grad_()
    y = model(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    again = copy.deepcopy(model).eval()(x.detach().float())
    assert torch.equal(y, again.to(dtype))


@pytest.mark.parametrize("kind", ["conv2d", "conv3d"])
@pytest.mark.parametrize("padding", [0, 1, "same"])
def test_channels_last_in_and_out(kind, padding):
    layout = torch.channels_last if kind == "conv2d" else torch.channels_last_3d
    make, shape = MODULES[kind]
    module = make()
    conv = type(module)(4, 3, 2, padding=padding)
    model = quantized(conv)
    x = random(*shape)
    y = model(x.to(memory_format=layout))
    assert y.is_contiguous(memory_format=layout)
    assert not y.is_contiguous()
    plain = model(x)
    assert plain.is_contiguous()
    assert torch.equal(y, plain)


@pytest.mark.parametrize("kind", MODULES)
def test_wrong_input_is_refused_by_name(kind):
    make, shape = MODULES[kind]
    model = quantized(make())
    before = states(model)
    channels = len(shape) - 1 if kind == "linear" else 1
    wrong = random(*(n + 1 if dim == channels else n for dim, n in enumerate(shape)))
    with pytest.raises(ValueError, match=r"'encoder\.0' takes .*4 .* got a tensor of shape") as caught:
        model(wrong)
    assert str(tuple(wrong.shape)) in str(caught.value)
    for dtype in (torch.int64, torch.int8, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=rf"'encoder\.0' takes a float tensor, got {dtype}"):
            model(torch.ones(shape).to(dtype))
    with pytest.raises((RuntimeError, TypeError), match=r"'encoder\.0' .*meta"):
        model(torch.ones(shape, device="meta"))
    assert states(model) == before


@pytest.mark.parametrize("shape", [(), (4,), (4, 6), (2, 2, 4, 6, 5)])
def test_wrong_number_of_dimensions_is_refused_by_name(shape):
    kind = "linear" if shape == () else "conv2d"
    with pytest.raises(ValueError, match=r"'encoder\.0' takes .* got a tensor of shape"):
        quantized(MODULES[kind][0]())(torch.ones(shape))


def test_input_smaller_than_the_kernel_is_refused_by_name():
    with pytest.raises(ValueError, match=r"encoder\.0"):
        quantized(nn.Conv2d(4, 3, 5))(torch.ones(1, 4, 3, 3))


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_input_and_gradient(kind, value, caplog):
    make, shape = MODULES[kind]
    model = quantized(make())
    good = random(*shape)
    bad = good.clone()
    bad.view(-1)[3] = value
    x = bad.requires_grad_()
    y = model(x)
    assert y.isnan().all()
    y.backward(torch.ones_like(y))
    assert model.encoder[0].weight.grad.isnan().all()
    assert x.grad.isfinite().all()
    assert [r.getMessage()[:37] for r in caplog.records] == ["NaN or infinity in input of 'encoder."]

    model.zero_grad()
    x = good.clone().requires_grad_()
    y = model(x)
    assert y.isfinite().all()
    g = torch.ones_like(y)
    g.view(-1)[0] = value
    y.backward(g)
    assert x.grad.isnan().all()
    assert model.encoder[0].weight.grad.isnan().all()
    assert "grad_output of 'encoder.0'" in caplog.records[-1].getMessage()

    model.zero_grad()
    x = good.clone().requires_grad_()
    model(x).sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, *model.parameters()))


def test_nonfinite_weight():
    model = quantized(nn.Linear(4, 3))
    x = random(5, 4).requires_grad_()
    for _ in range(2):
        with torch.no_grad():
            model.encoder[0].weight[1, 1] = math.nan
        y = model(x)
        assert y.isnan().all()
        y.sum().backward()
        assert x.grad.isnan().all()
        assert model.encoder[0].weight.grad.isfinite().all()
        with torch.no_grad():
            model.encoder[0].weight[1, 1] = 1
        model.zero_grad()
        x.grad = None
        assert model(x).isfinite().all()


@pytest.mark.parametrize("kind", MODULES)
def test_statistics_move_only_in_training_with_gradients(kind):
    make, shape = MODULES[kind]
    model = quantized(make())
    fresh = states(model)

    def still_steps():
        model.eval()
        x = random(*shape, seed=9).requires_grad_() * 50
        model(x).sum().backward()
        model.train()
        with torch.no_grad():
            model(x * 3)
        with torch.inference_mode():
            model(x.detach() * 3)

    still_steps()
    assert states(model) == fresh
    model(random(*shape)).sum().backward()
    moved = states(model)
    assert moved != fresh
    operands = moved["encoder.0"]["operands"]
    assert [operands[name]["step"] for name in OPERANDS] == [1, 1, 1]
    still_steps()
    assert states(model) == moved


def test_evaluation_before_training_gives_the_usual_answer():
    plain = nn.Linear(64, 8)
    model = quantized(copy.deepcopy(plain)).eval()
    x = random(16, 64)
    assert (model(x) - plain(x)).norm() < 0.03 * plain(x).norm()


def test_repr_shows_the_widths():
    model = quantized(nn.Linear(4, 3), bitwidth=16)
    module = model.encoder[0]
    assert repr(module) == (
        "QuantizedLinear(in_features=4, out_features=3, bias=True, input=int16, weight=int16, grad_output=int16)"
    )
    module.quantizers.grad_output.state.bits = 31
    assert "weight=int16, grad_output=int31" in repr(model)
    conv = quantized(nn.Conv2d(4, 3, 2, stride=2)).encoder[0]
    assert repr(conv).startswith("QuantizedConv2d(4, 3, kernel_size=(2, 2), stride=(2, 2), input=int8")


def test_classes_are_still_those_of_torch():
    linear, conv = quantized(nn.Linear(2, 2)).encoder[0], quantized(nn.Conv2d(2, 2, 1)).encoder[0]
    assert isinstance(linear, nn.Linear)
    assert isinstance(conv, nn.Conv2d)
    assert (type(linear), type(conv)) == (QuantizedLinear, QuantizedConv2d)


def test_training_is_the_same_for_one_thread_and_two():
    torch.manual_seed(0)
    start = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            model = quantized(copy.deepcopy(start))
            gradients = []
            for seed in range(3):
                model.zero_grad()
                model(random(16, 3, 8, 8, seed=seed)).square().mean().backward()
                gradients.append(model.encoder[0][3].weight.grad.clone())
            results.append((states(model), torch.stack(gradients)))
    finally:
        torch.set_num_threads(threads)
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_transformer_layer_stays_on_the_core_in_evaluation(monkeypatch):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    convert(layer, QuantizeConfig())
    layer(torch.randn(2, 5, 16))
    called, forward = [], type(layer.linear1).forward
    monkeypatch.setattr(type(layer.linear1), "forward", lambda self, x: called.append(self) or forward(self, x))
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(2, 5, 16))
    assert called == [layer.linear1, layer.linear2]
