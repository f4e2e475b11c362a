import copy
import io
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import cnmix
import cnmix.torch_mlu
from cnmix.fixed_point import POSITION_MAX, POSITION_MIN, limits
from cnmix.inference import load, vendor_state_dict
from cnmix.inference.vendor import scale_and_mode
from cnmix.torch_mlu.core.mlu_quantize import quantize_dynamic_mlu
from cnmix.torch_mlu.core.quantized.functional import formats
from cnmix.torch_mlu.core.quantized.state import parse_quantization


@pytest.fixture
def card() -> Iterator[None]:
    """Puts an emulated card in place for a test."""
    cnmix.torch_mlu.install(cards=1, strict=False, card_name="MLU370")
    yield
    cnmix.torch_mlu.install(cards=0, strict=False, card_name="MLU370")


class Net(nn.Module):
    def __init__(self, norm=False):
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.second = nn.Conv2d(6, 4, 3, stride=2, groups=2, bias=False)
        self.volumes = nn.Conv3d(1, 2, 2)
        self.rows = nn.Conv1d(6, 4, 2)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = self.second(self.norm(self.first(x)).relu()).relu()
        x = self.volumes(x.unsqueeze(1)).relu().flatten(1, 2)
        return self.head(self.rows(x.flatten(2)).flatten(1))


class Others(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 4)
        self.up = nn.ConvTranspose1d(3, 3, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0]), self.up(x)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(model, x, steps=3, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    cnmix.initialize(model, optimizer, opt_level="O1", steps_per_epoch=steps, **settings)
    for _ in range(steps):
        y = model(x)
        optimizer.zero_grad()
        sum(each.square().mean() for each in (y if isinstance(y, tuple) else (y,))).backward()
        optimizer.step()
    return copy.deepcopy({"state_dict": model.state_dict(), "cnmix": cnmix.state_dict(model)})


def net(norm=False):
    torch.manual_seed(0)
    return Net(norm)


def on_card(model, state, x):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    model = quantize_dynamic_mlu(model)
    model.load_state_dict(torch.load(file, weights_only=True), strict=True)
    with torch.no_grad():
        return model.to("mlu")(x.to("mlu")).cpu()


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("bitwidth", [8, 16, 31])
def test_the_card_computes_what_the_integer_model_does(bitwidth):
    x = random(4, 2, 7, 7)
    checkpoint = trained(net(), x, bitwidth=bitwidth, max_bitwidth=bitwidth)
    state = vendor_state_dict(net(), checkpoint)
    assert state["first.scale"].dtype == torch.float32
    if bitwidth < 31:
        assert state["first.quantized_mode"].tolist() == [bitwidth // 8]
    with torch.no_grad():
        expected = load(net(), checkpoint)(x)
    assert torch.equal(on_card(net(), state, x), expected)


@pytest.mark.usefixtures("card")
def test_input_and_weight_of_two_widths():
    x = random(4, 2, 7, 7)
    checkpoint = trained(net(), x, max_bitwidth=8)
    for each in checkpoint["cnmix"]["models"][0]["modules"].values():
        each["operands"]["input"]["bits"] = 16
        each["operands"]["input"]["position"] -= 8
        each["settings"]["input"]["max_bitwidth"] = 16
    state = vendor_state_dict(net(), checkpoint)
    assert state["head.scale"].tolist() == [16, 8]
    with torch.no_grad():
        expected = load(net(), checkpoint)(x)
    assert torch.equal(on_card(net(), state, x), expected)


@pytest.mark.usefixtures("card")
def test_batch_norms_stay():
    x = random(4, 2, 7, 7)
    checkpoint = trained(net(norm=True), x, max_bitwidth=8)
    state = vendor_state_dict(net(norm=True), checkpoint)
    assert "norm.running_mean" in state
    with torch.no_grad():
        expected = load(net(norm=True), checkpoint)(x)
    # Its floats round otherwise: an element may be an integer away where the next layer quantizes it.
    torch.testing.assert_close(on_card(net(norm=True), state, x), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("widths", [(8, 8), (16, 16), (31, 31), (8, 16), (16, 8), (31, 8)])
def test_every_position_comes_back(widths):
    of_input, of_weight = widths
    for position in range(POSITION_MIN, POSITION_MAX + 1):
        weight_position = POSITION_MAX - (position - POSITION_MIN)
        scale, mode = scale_and_mode(of_input, position, of_weight, weight_position)
        values = {"scale": torch.tensor(scale), "quantized_mode": torch.tensor(mode, dtype=torch.int32)}
        read = parse_quantization(values, "", 1, True)
        assert formats(*read)[:4] == (of_input, position, of_weight, weight_position)
        if len(mode) == 1:  # the vendor's kernels may take the logarithm in float32
            qmax = torch.tensor(float(limits(of_input)[1]))
            found = torch.log2(qmax / values["scale"]).floor().int() - (of_input - 2)
            assert found.tolist() == [position, weight_position]


def test_what_the_vendor_has_no_integers_for_is_named(caplog):
    torch.manual_seed(0)
    checkpoint = trained(Others(), random(5, 3, 4))
    state = vendor_state_dict(Others(), checkpoint)
    assert "no integers for the products of lstm, up, which are float there" in caplog.text
    assert {name for name in state if name.endswith("scale")} == {"head.scale"}
    plain = Others()
    plain.load_state_dict({name: value for name, value in state.items() if name in plain.state_dict()}, strict=True)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.mixed = nn.Parameter(torch.eye(4))

    def forward(self, x):
        y = self.head(x)
        return nn.functional.scaled_dot_product_attention(y, y, y) @ self.mixed


def test_what_functions_multiply_is_named(caplog):
    checkpoint = trained(Attending(), random(5, 3, 4))
    state = vendor_state_dict(Attending(), checkpoint)
    for name in ("attention.scores, ", "attention.values, ", "matmul(mixed), which are float there"):
        assert name in caplog.text
    assert {name for name in state if name.endswith("scale")} == {"head.scale"}
    quantize_dynamic_mlu(Attending()).load_state_dict(state, strict=True)


def test_the_model_stays_and_its_errors_are_those_of_load():
    checkpoint = trained(net(), random(4, 2, 7, 7))
    model = net()
    vendor_state_dict(model, checkpoint)
    assert type(model.first) is nn.Conv2d
    with pytest.raises(ValueError, match="no checkpoint of training with cnmix"):
        vendor_state_dict(model, {"state_dict": checkpoint["state_dict"]})
    with pytest.raises(ValueError, match="the input of 'first' is rounded by 'half_up', and a card"):
        vendor_state_dict(net(), trained(net(), random(4, 2, 7, 7), rounding="half_up"))
    with pytest.raises(ValueError, match="the input of 'first' was zero throughout training"):
        vendor_state_dict(net(), trained(net(), torch.zeros(4, 2, 7, 7)))
    checkpoint["state_dict"]["head.weight"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight of 'head' holds NaN"):
        vendor_state_dict(net(), checkpoint)
