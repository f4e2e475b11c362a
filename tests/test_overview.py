import torch
from torch import nn

import cnmix


class OwnLinear(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ConvTranspose2d(8, 4, 2),
        nn.Flatten(),
        nn.Linear(4 * 7 * 7, 16),
        OwnLinear(16, 16),
        nn.Linear(16, 10),
    )


def test_what_is_fixed_point_and_what_stayed_float_and_why():
    model, _ = cnmix.initialize(net(), None, exclude=["5"], bitwidth=16)
    training = model.training
    found = cnmix.summary(model, torch.randn(2, 3, 8, 8))
    rows = {row.fqn: row for row in found.rows}
    assert list(rows) == ["0", "1", "3", "4", "5"]
    assert rows["0"].widths == rows["1"].widths == rows["3"].widths == (16, 16, 16)
    assert rows["0"].macs == 2 * 8 * 36 * 27
    assert (rows["0"].product, rows["1"].product, rows["3"].product) == ("convolution", "convolution", "matmul")
    assert rows["0"].shapes == ((2, 3, 8, 8), (2, 8, 6, 6))
    assert "2×3×8×8 → 2×8×6×6" in str(found)
    assert rows["1"].macs == 2 * 8 * 36 * 16
    assert rows["3"].macs == 2 * 16 * 196
    assert rows["4"].reason == "the functions that it calls go to the core, and are listed once they have been trained"
    assert rows["5"].reason == "left out"
    fixed = rows["0"].macs + rows["1"].macs + rows["3"].macs
    assert found.share == fixed / sum(row.macs or 0 for row in found.rows)
    assert "int16" in str(found)
    assert f"{found.share:.1%}" in str(found)
    assert model.training == training
    assert model[0].quantizers.input.state.step == 0
    assert not model[0]._forward_hooks


def test_without_an_example_and_without_conversion():
    found = cnmix.summary(net())
    assert found.share is None
    assert {row.reason for row in found.rows} == {"the model is not converted"}
    assert "float" in str(found)


def test_dequantize_gives_the_plain_model_back():
    torch.manual_seed(0)
    model = net()
    modules, parameters = list(model.modules()), list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cnmix.initialize(model, optimizer, opt_level="O2")
    x = torch.randn(2, 3, 8, 8)
    model(x).sum().backward()
    optimizer.step()
    plain = net()
    plain.load_state_dict(model.state_dict())
    assert cnmix.dequantize(model) is model
    assert [a is b for a, b in zip(model.modules(), modules, strict=True)] == [True] * len(modules)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [type(module) for module in model] == [type(module) for module in plain]
    assert torch.equal(model(x), plain(x))
    assert not hasattr(model[0], "quantizers")
    cnmix.initialize(model, None, opt_level="O1")
    assert hasattr(model[0], "quantizers")


def test_dequantize_of_a_transformer_layer_restores_its_fast_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    before = layer.activation_relu_or_gelu
    cnmix.initialize(layer, None)
    assert layer.activation_relu_or_gelu == 0
    cnmix.dequantize(layer)
    assert layer.activation_relu_or_gelu == before


def test_a_wrapped_model_says_the_same():
    model = net()
    cnmix.initialize(model, None, exclude=["5"])
    model.append(nn.Linear(10, 10))
    expected = [row.reason for row in cnmix.summary(model).rows]
    assert expected[-2:] == ["left out", "came after initialize: call it again"]
    assert [row.reason for row in cnmix.summary(nn.DataParallel(model)).rows] == expected
