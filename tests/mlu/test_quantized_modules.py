"""What is in a state_dict of quantized modules, and what comes of one that is loaded."""

import copy
import io
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import cnmix.torch_mlu
from cnmix.torch_mlu.core.mlu_quantize import quantize_dynamic_mlu
from cnmix.torch_mlu.core.quantized import modules as cnq


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def float_model(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5, bias=bias)).eval()


IMAGES = random(2, 3, 4, 4)


def generated(dtype="int8", model=None, data=IMAGES, **scheme):
    made = quantize_dynamic_mlu(model or float_model(), scheme, dtype=dtype, gen_quant=True)
    with torch.no_grad():
        made(data)
    return made


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def loaded(state, model=None):
    made = quantize_dynamic_mlu(model or float_model())
    assert str(made.load_state_dict(state)) == "<All keys matched successfully>"
    return made


def described(state, prefix):
    return {
        name.removeprefix(prefix): (tuple(value.shape), value.dtype)
        for name, value in state.items()
        if name.startswith(prefix)
    }


FLOAT = {"weight": ((4, 3, 3, 3), torch.float32), "bias": ((4,), torch.float32)}
ALWAYS = {**FLOAT, "use_symmetry": ((1,), torch.int64), "quantized_mode": ((1,), torch.int32)}
GENERATED = {"scale_weight_per_channel": ((4,), torch.float32), "quantized_by_channel": ((1,), torch.int64)}
FIRST = {"input_mean": ((1, 3, 1, 1), torch.float32), "input_std": ((1, 3, 1, 1), torch.float32)}


@pytest.mark.parametrize(("dtype", "mode", "qmax"), [("int8", 1, 127), ("int16", 2, 32767)])
def test_keys_and_values_per_tensor(dtype, mode, qmax):
    model = generated(dtype)
    state = saved(model.state_dict())
    assert described(state, "0.") == {**ALWAYS, "scale": ((2,), torch.float32)}
    assert set(described(state, "3.")) == {"weight", "bias", "use_symmetry", "scale", "quantized_mode"}
    own = [qmax / each.abs().max().item() for each in (IMAGES, model[0].weight)]
    assert state["0.scale"].tolist() == torch.tensor(own).tolist()
    assert (state["0.use_symmetry"].tolist(), state["0.quantized_mode"].tolist()) == ([1], [mode])
    run = loaded(state)
    assert described(run.state_dict(), "0.") == described(state, "0.")
    assert all(torch.equal(value, state[name]) for name, value in run.state_dict().items())


@pytest.mark.parametrize(("dtype", "mode", "qmax"), [("int8", 1, 127), ("int16", 2, 32767)])
def test_keys_and_values_per_channel(dtype, mode, qmax):
    model = generated(dtype, per_channel=True, data_scale=0.5)
    state = saved(model.state_dict())
    assert described(state, "0.") == {**ALWAYS, "scale": ((2,), torch.float32), **GENERATED}
    assert state["0.scale"].tolist() == [torch.tensor(qmax / (IMAGES.abs().max().item() * 0.5)).item(), 0.0]
    own = torch.full((4,), qmax) / (model[0].weight.flatten(1).abs().amax(1) * 0.5)
    assert torch.equal(state["0.scale_weight_per_channel"], own)
    assert state["0.quantized_mode"].tolist() == [mode]
    run = loaded(state)
    again = saved(run.state_dict())
    assert described(again, "0.") == {**ALWAYS, "scale": ((6,), torch.float32)}
    assert again["0.quantized_mode"].tolist() == [mode + 2]
    assert again["0.scale"].tolist() == [*state["0.scale"].tolist(), *own.tolist()]
    twice = loaded(again).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in twice.items())
    assert twice.keys() == again.keys()


def test_data_scale_is_not_for_weights_per_tensor():
    weight_scales = [generated(data_scale=scale).state_dict()["0.scale"][1].item() for scale in (1.0, 0.25)]
    assert weight_scales[0] == weight_scales[1]


def test_values_are_parameters_and_observers_have_no_keys():
    state = generated(per_channel=True).state_dict()
    assert all(isinstance(value, Parameter) for value in state.values())
    constants = [value for name, value in state.items() if not name.endswith(("weight", "bias"))]
    assert not any(value.requires_grad for value in constants)


def test_before_a_file_is_loaded_there_is_only_use_symmetry():
    state = quantize_dynamic_mlu(float_model()).state_dict()
    assert set(described(state, "0.")) == {"weight", "bias", "use_symmetry"}
    assert quantize_dynamic_mlu(float_model())[0].scale is None


@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_model_that_saw_nothing_can_be_saved_and_loaded(dtype, per_channel):
    model = quantize_dynamic_mlu(float_model(), {"per_channel": per_channel}, dtype=dtype, gen_quant=True)
    with pytest.warns(UserWarning, match="the input of '[03]' was not observed"):
        state = saved(model.state_dict())
    assert state["0.scale"][0] == 1
    run = loaded(state)
    mode = 1 + (dtype == "int16") + 2 * per_channel
    assert run.state_dict()["0.quantized_mode"].tolist() == [mode]
    assert loaded(saved(run.state_dict())).to("mlu")(IMAGES.to("mlu")).isfinite().all()


def test_a_missing_bias_becomes_zeros():
    state = saved(generated(model=float_model(bias=False)).state_dict())
    assert "0.bias" not in state
    run = loaded(state, float_model(bias=False))
    assert run[0].bias.tolist() == [0.0] * 4
    again = saved(run.state_dict())
    assert "0.bias" in again
    other = loaded(again, float_model(bias=False))
    assert torch.equal(*(each.to("mlu")(IMAGES.to("mlu")).cpu() for each in (run, other)))
    with pytest.warns(UserWarning, match=r"[03].bias is not in the state_dict"):
        assert quantize_dynamic_mlu(float_model()).load_state_dict(state)


class TestFirstConvolution:
    scheme: ClassVar[dict] = {"mean": [0.5, 0.25, 0.0], "std": [0.2, 0.1, 1.0], "firstconv": True}

    def test_mean_and_std_are_saved_times_255(self):
        state = saved(generated(**self.scheme).state_dict())
        assert described(state, "0.") == {**ALWAYS, "scale": ((2,), torch.float32), **FIRST}
        assert state["0.input_mean"].flatten().tolist() == [127.5, 63.75, 0.0]
        assert state["0.input_std"].flatten().tolist() == (torch.tensor([0.2, 0.1, 1.0]) * 255).tolist()
        assert described(saved(loaded(state).state_dict()), "0.") == described(state, "0.")

    def test_the_host_ignores_them_and_the_card_does_not(self):
        images = (torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 255).round()
        mean, std = (torch.tensor(self.scheme[name]).view(1, 3, 1, 1) * 255 for name in ("mean", "std"))
        normal = (images - mean) / std
        model = float_model()
        run = loaded(generated("int16", model, normal, **self.scheme).state_dict(), model)
        assert torch.equal(run(normal), model(normal))
        y = run.to("mlu")(images.to(torch.uint8).to("mlu"))
        assert torch.allclose(y.cpu(), model(normal), atol=1e-3)

    def test_only_the_first_convolution_of_each_model_has_them(self):
        for _ in range(2):  # as often as one likes in a process
            model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Conv2d(3, 3, 1)), nn.Conv2d(3, 3, 1))
            state = quantize_dynamic_mlu(model, self.scheme, dtype="int8").state_dict()
            assert [name for name in state if "input_" in name] == ["1.0.input_mean", "1.0.input_std"]

    def test_a_file_without_them_leaves_what_the_qconfig_says(self):
        with_them, without = generated(**self.scheme).state_dict(), generated().state_dict()
        run = quantize_dynamic_mlu(float_model(), self.scheme)
        run.load_state_dict(without)
        assert run[0].input_mean.flatten().tolist() == [127.5, 63.75, 0.0]
        run = quantize_dynamic_mlu(float_model())
        run.load_state_dict(with_them)
        assert run[0].input_mean is not None
        run.load_state_dict(without)
        assert run[0].input_mean is None

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"0.input_std": None}, "0.input_std missing beside 0.input_mean"),
            ({"0.input_mean": torch.zeros(3)}, r"0.input_mean must have the shape \(1, 3, 1, 1\), got \(3,\)"),
            ({"0.input_std": torch.zeros(1, 3, 1, 1)}, "0.input_std above 0"),
            ({"0.input_std": -torch.ones(1, 3, 1, 1)}, "0.input_std above 0"),
            ({"0.input_mean": torch.full((1, 3, 1, 1), torch.nan)}, "0.input_mean must be finite"),
        ],
    )
    def test_wrong_ones_are_named(self, change, message):
        state = {**generated(**self.scheme).state_dict(), **change}
        state = {name: value for name, value in state.items() if value is not None}
        with pytest.raises(RuntimeError, match=message):
            quantize_dynamic_mlu(float_model()).load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True])
def test_a_file_is_loaded_on_the_card_as_on_the_host(assign):
    state = generated("int16", per_channel=True).state_dict()
    run = loaded(state).to("mlu")
    other = quantize_dynamic_mlu(float_model()).to("mlu")
    there = {name: value.to("mlu") for name, value in state.items()}
    other.load_state_dict(there, assign=assign)
    assert torch.equal(other(IMAGES.to("mlu")).cpu(), run(IMAGES.to("mlu")).cpu())
    assert {value.device.type for value in other.state_dict().values()} == {"mlu"}


def test_loading_copies():
    state = generated(mean=[0.5] * 3, std=[0.5] * 3).state_dict()
    run = loaded(state)
    with torch.no_grad():
        run[0].input_mean.zero_()
        run[0].weight.zero_()
    assert state["0.input_mean"].all()
    assert state["0.weight"].any()


def test_half_leaves_the_scales_as_they_are():
    run = loaded(generated("int16").state_dict())
    scale = run.state_dict()["0.scale"].clone()
    assert scale.max() > 65504 / 4
    state = run.half().state_dict()
    assert state["0.weight"].dtype == torch.float16
    assert state["0.scale"].dtype == torch.float32
    assert torch.equal(state["0.scale"], scale)
    y = run.to("mlu")(IMAGES.half().to("mlu"))
    assert y.dtype == torch.float16
    assert torch.allclose(y.cpu().float(), float_model()(IMAGES), atol=5e-3)


def test_modules_can_be_copied_and_pickled():
    run = loaded(generated(per_channel=True, mean=[0.5] * 3, std=[0.5] * 3).state_dict())
    file = io.BytesIO()
    torch.save(run, file)
    file.seek(0)
    for other in (copy.deepcopy(run), torch.load(file, weights_only=False)):
        assert torch.equal(other.to("mlu")(IMAGES.to("mlu")).cpu(), run.to("mlu")(IMAGES.to("mlu")).cpu())


def test_a_generating_model_that_loads_a_file_goes_on_from_it():
    state = generated().state_dict()
    other = quantize_dynamic_mlu(float_model(), dtype="int8", gen_quant=True)
    other.load_state_dict(state)
    assert torch.equal(other.state_dict()["0.scale"], state["0.scale"])
    other(IMAGES * 2)
    assert other.state_dict()["0.scale"][0] == state["0.scale"][0] / 2
    other.load_state_dict(float_model().state_dict())


ALONE = [
    (lambda: cnq.MLULinear(4, 3), (2, 4)),
    (lambda: cnq.MLUConv1d(2, 3, 3), (1, 2, 5)),
    (lambda: cnq.MLUConv2d(2, 3, 3), (1, 2, 5, 5)),
    (lambda: cnq.MLUConv3d(2, 3, 1), (1, 2, 2, 2, 2)),
]


@pytest.mark.parametrize(("make", "shape"), ALONE)
def test_modules_stand_alone(make, shape):
    module = make()
    assert module(random(*shape)).shape[1] == 3
    with pytest.raises(RuntimeError, match=f"'{type(module).__name__}' has no scales"):
        module.to("mlu")(random(*shape).to("mlu"))


GEOMETRIES = [
    {"kernel_size": 2, "padding": "same"},
    {"kernel_size": 3, "padding": "valid", "stride": 2},
    {"kernel_size": 3, "padding": (1, 2), "dilation": (1, 2)},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": (2, 3), "padding": (0, 1), "padding_mode": "circular", "groups": 2},
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # PyTorch's, of the float module
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
def test_convolutions_of_every_geometry(geometry, per_channel):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 6, **geometry)), random(2, 4, 7, 6)
    scheme = {"mean": [0.1] * 4, "std": [0.5] * 4, "per_channel": per_channel}
    run = quantize_dynamic_mlu(model)
    run.load_state_dict(generated("int16", model, x, **scheme).state_dict())
    with torch.no_grad():
        y = run.to("mlu")((x * 127.5 + 25.5).to("mlu"))
        assert torch.allclose(y.cpu(), model(x), atol=2e-3)
        assert torch.equal(run(x[0].to("mlu")).cpu(), run(x[:1].to("mlu"))[0].cpu())


@pytest.mark.parametrize("strict", [False, True])
def test_a_module_and_its_input_are_on_one_device(strict):
    cnmix.torch_mlu.install(strict=strict)
    run = loaded(generated().state_dict())
    with pytest.raises(RuntimeError, match="'0' is on cpu and got a tensor of mlu:0"):
        run(IMAGES.to("mlu"))
    run.to("mlu")
    with pytest.raises(RuntimeError, match="'0' is on mlu:0 and got a tensor of cpu"):
        run(IMAGES)
    with pytest.raises(RuntimeError, match="'3' is on mlu:0 and got a tensor of cpu"):
        run[3](torch.ones(1, 16))


@pytest.mark.parametrize("card", ["MLU220", "MLU270", "MLU370", "MLU590"])
def test_every_card_computes_the_same_strict_or_not(card):
    run = loaded(generated(mean=[0.5] * 3, std=[0.5] * 3).state_dict()).to("mlu")
    expected = run(IMAGES.to("mlu")).cpu()
    cnmix.torch_mlu.install(strict=True, card_name=card)
    assert torch.equal(run(IMAGES.to("mlu")).cpu(), expected)
