import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from cnmix.nn import QuantizedModule
from cnmix.torch_mlu.core import mlu_model, mlu_quantize
from cnmix.torch_mlu.core.mlu_quantize import quantize_dynamic_mlu
from cnmix.torch_mlu.core.quantized import modules as cnq
from cnmix.torch_mlu.core.quantized.default_mappings import DEFAULT_DYNAMIC_MODULE_MAPPING

# PyTorch deprecates it; the vendor's documents trace.
traces = pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated.*:DeprecationWarning")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """The vendor's MNIST guide's, smaller."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, 1)
        self.conv2 = nn.Conv2d(4, 8, 3, 1)
        self.dropout1 = nn.Dropout(0.25)
        self.fc1 = nn.Linear(72, 16)
        self.fc2 = nn.Linear(16, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        x = F.relu(self.fc1(torch.flatten(self.dropout1(x), 1)))
        return F.log_softmax(self.fc2(x), dim=1)


IMAGES = random(8, 1, 10, 10)


def net():
    torch.manual_seed(0)
    return Net()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


class TestAdaptive:
    @pytest.mark.parametrize("bitwidth", [8, 16, 31])
    def test_trains_on_the_card(self, bitwidth):
        original = net()
        before = copy.deepcopy(original.state_dict())
        model = mlu_quantize.adaptive_quantize(model=original, steps_per_epoch=10, bitwidth=bitwidth)
        on_card = model.to(mlu_model.mlu_device())
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        optimizer = mlu_model.to(optimizer, torch.device("mlu"))
        labels = torch.arange(8).to("mlu")
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = F.nll_loss(on_card(IMAGES.to("mlu")), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 2
        assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
        # a checkpoint of it goes into a fresh one, strictly, and that becomes a float model
        state = through_a_file(on_card.state_dict())
        assert state.keys() == before.keys()
        again = mlu_quantize.adaptive_quantize(net(), steps_per_epoch=10, bitwidth=bitwidth)
        again.load_state_dict(state)
        plain = mlu_quantize.dequantize(again)
        assert plain is again
        assert type(plain.conv1) is nn.Conv2d
        expected = net().eval()
        expected.load_state_dict(state)
        assert torch.equal(plain.eval()(IMAGES), expected(IMAGES))

    def test_a_copy_or_in_place(self):
        original = net()
        assert mlu_quantize.adaptive_quantize(original, 1) is not original
        assert type(original.conv1) is nn.Conv2d
        assert mlu_quantize.adaptive_quantize(original, steps_per_epoch=1, bitwidth=16, inplace=True) is original
        assert isinstance(original.conv1, QuantizedModule)
        assert mlu_quantize.adaptive_quantize(original, steps_per_epoch=1, bitwidth=16, inplace=True) is original

    def test_errors(self):
        with pytest.raises(TypeError, match=r"takes a torch.nn.Module, got list"):
            mlu_quantize.adaptive_quantize([net()], 1)
        with pytest.raises(ValueError, match="bitwidth must be one of 8, 16, 31"):
            mlu_quantize.adaptive_quantize(net(), 1, bitwidth=12)

    def test_a_model_in_training_is_to_be_dequantized_first(self):
        model = mlu_quantize.adaptive_quantize(net(), 1)
        with pytest.raises(ValueError, match=r"'conv1' is quantized for adaptive training.*dequantize"):
            quantize_dynamic_mlu(model, dtype="int8", gen_quant=True)
        assert quantize_dynamic_mlu(mlu_quantize.dequantize(model)).conv1.training is False


class TestConversion:
    def test_which_modules_are_replaced(self):
        class IConv(nn.Conv2d):
            pass

        class Conv2d(nn.Conv2d):
            pass

        model = nn.Sequential(
            nn.Linear(1, 1), nn.Conv1d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.Conv3d(1, 1, 1),
            Conv2d(1, 1, 1), IConv(1, 1, 1), nn.ConvTranspose2d(1, 1, 1), nn.BatchNorm2d(1),
        )  # fmt: skip
        made = quantize_dynamic_mlu(model)
        kinds = [cnq.MLULinear, cnq.MLUConv1d, cnq.MLUConv2d, cnq.MLUConv3d, cnq.MLUConv2d]
        assert [type(each) for each in made] == [*kinds, IConv, nn.ConvTranspose2d, nn.BatchNorm2d]
        with_own = quantize_dynamic_mlu(model, mapping={IConv: cnq.MLUConv2d, nn.Linear: cnq.MLULinear})
        changed = [index for index, each in enumerate(with_own) if isinstance(each, cnq.MLUQuantizedModule)]
        assert changed == [0, 5]
        assert set(DEFAULT_DYNAMIC_MODULE_MAPPING.values()) == {*kinds}

    def test_a_copy_or_in_place(self):
        model = net()
        assert quantize_dynamic_mlu(model) is not model
        assert type(model.conv1) is nn.Conv2d
        assert model.training
        parameters = [*model.parameters()]
        assert quantize_dynamic_mlu(model, inplace=True) is model
        assert not model.training
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))

    @pytest.mark.parametrize("gen_quant", [False, True])
    def test_a_second_time_changes_nothing(self, gen_quant):
        model = quantize_dynamic_mlu(net(), dtype="int8", gen_quant=gen_quant)
        modules, hooks = [*model.modules()], [len(each._forward_hooks) for each in model.modules()]
        quantize_dynamic_mlu(model, dtype="int8", gen_quant=gen_quant, inplace=True)
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
        assert [len(each._forward_hooks) for each in model.modules()] == hooks

    def test_a_model_that_cannot_be_copied_is_changed_in_place(self):
        class Stubborn(Net):
            def __deepcopy__(self, memo):
                raise RuntimeError("no copies")

        model = Stubborn()
        with pytest.warns(UserWarning, match=r"Stubborn cannot be copied \(no copies\).*in place"):
            assert quantize_dynamic_mlu(model) is model
        assert type(model.conv1) is cnq.MLUConv2d

    def test_the_model_itself_is_not_replaced(self):
        with pytest.warns(UserWarning, match=r"the model itself is a Linear.*nn\.Sequential"):
            assert type(quantize_dynamic_mlu(nn.Linear(2, 2))) is nn.Linear

    def test_a_module_at_two_places_stays_one(self):
        shared = nn.Linear(4, 4)
        model = quantize_dynamic_mlu(nn.Sequential(shared, nn.Sequential(shared)), dtype="int8", gen_quant=True)
        assert model[0] is model[1][0]

    def test_hooks_stay(self):
        model, seen = net(), []
        handle = model.conv1.register_forward_hook(lambda module, args, y: seen.append(type(module)))
        quantize_dynamic_mlu(model, inplace=True)(IMAGES)
        assert seen == [cnq.MLUConv2d]
        handle.remove()
        model(IMAGES)
        assert len(seen) == 1

    def test_a_computed_weight_stays_float(self):
        layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
        assert "Parametrized" in type(quantize_dynamic_mlu(nn.Sequential(layer))[0]).__name__
        pruned = nn.Linear(3, 3)
        prune.random_unstructured(pruned, "weight", 0.5)
        with pytest.warns(UserWarning, match="whose weight is computed from others"):
            assert type(quantize_dynamic_mlu(nn.Sequential(pruned), inplace=True)[0]) is nn.Linear

    def test_a_transformer_layer_does_not_go_around_its_products(self):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        model, x = nn.Sequential(layer).eval(), random(2, 3, 8)
        with torch.no_grad():
            generated = quantize_dynamic_mlu(model, dtype="int8", gen_quant=True)
            generated(x)
            run = quantize_dynamic_mlu(model)
            run.load_state_dict(generated.state_dict())
            run.to("mlu")
            before = run(x.to("mlu")).cpu()
            run[0].linear2.weight.mul_(0.999)  # less than a step of int8
            assert not torch.equal(before, model(x))
            assert torch.allclose(before, model(x), atol=0.1)

    def test_arguments_by_name_are_observed(self):
        model = quantize_dynamic_mlu(nn.Sequential(nn.Linear(2, 2)), dtype="int8", gen_quant=True)
        model[0](input=torch.tensor([[2.0, 4.0]]))
        assert model.state_dict()["0.scale"][0] == 127 / 4

    def test_mixed_layer(self):
        mixed = {"fc1,conv2": "int16", "conv1": "float16"}
        generated = quantize_dynamic_mlu(net(), dtype="int8", gen_quant=True, mixed_layer=mixed)
        generated(IMAGES)
        state = generated.state_dict()
        modes = {name: value.item() for name, value in state.items() if name.endswith("mode")}
        assert modes == {"conv2.quantized_mode": 2, "fc1.quantized_mode": 2, "fc2.quantized_mode": 1}
        assert type(generated.conv1) is nn.Conv2d
        run = quantize_dynamic_mlu(net(), mixed_layer=mixed)
        run.load_state_dict(state)
        assert torch.allclose(run.to("mlu")(IMAGES.to("mlu")).cpu(), net().eval()(IMAGES), atol=0.02)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"gen_quant": True}, "takes dtype='int8' or dtype='int16'"),
            ({"dtype": "int4"}, "dtype must be 'int8' or 'int16', got 'int4'"),
            ({"qconfig_spec": [1]}, r"qconfig_spec must be a dict.*\[1\]"),
            ({"qconfig_spec": {"data_scale": 0}}, "data_scale must be a positive number"),
            ({"qconfig_spec": {"iteration": 0}}, "iteration must be a whole number"),
            ({"qconfig_spec": {"use_avg": "no"}}, "use_avg must be True or False"),
            ({"qconfig_spec": {"method": "kl"}}, "method must be 'minmax', got 'kl'"),
            ({"qconfig_spec": {"mean": "x"}}, "mean must be a list"),
            ({"qconfig_spec": {"firstconv": True}}, "firstconv takes mean and std"),
            ({"qconfig_spec": {"mean": [0], "std": [0]}}, r"std in \(0, 1\].*std=\[0.0\]"),
            ({"qconfig_spec": {"mean": [124], "std": [0.5]}}, r"mean must lie in \[0, 1\].*\[124.0\]"),
            ({"qconfig_spec": {"mean": [0, 0, 0], "std": [0.5] * 3}}, r"'conv1' has 1 input channels.* 3 values"),
            ({"mapping": {nn.Linear: nn.Identity}}, r"mapping: .*Identity.* has no from_float\(module\)"),
            ({"mixed_layer": {"conv1": "int4"}}, "mixed_layer: 'conv1' must be 'int8', 'int16' or 'float16'"),
            ({"mixed_layer": {"conv9,conv1": "int8"}}, "this Net has nothing to quantize at 'conv9'"),
        ],
    )
    def test_wrong_arguments_leave_the_model_as_it_is(self, arguments, message):
        model = net()
        with pytest.raises(ValueError, match=message):
            quantize_dynamic_mlu(model, **arguments, inplace=True)
        assert model.training
        assert type(model.conv1) is nn.Conv2d
        assert "qconfig" not in vars(model.conv1)

    def test_no_model(self):
        with pytest.raises(TypeError, match=r"takes a torch.nn.Module, got dict"):
            quantize_dynamic_mlu({})

    def test_a_conv3d_has_no_scale_per_channel(self):
        model = nn.Sequential(nn.Conv3d(1, 1, 1))
        with pytest.raises(ValueError, match="'0' is a Conv3d, which never has a scale per channel"):
            quantize_dynamic_mlu(model, {"per_channel": True}, dtype="int8", gen_quant=True)
        mixed = {"0": "float16"}
        made = quantize_dynamic_mlu(model, {"per_channel": True}, dtype="int8", gen_quant=True, mixed_layer=mixed)
        assert type(made[0]) is nn.Conv3d

    def test_unknown_keys_are_ignored_with_a_warning(self):
        with pytest.warns(UserWarning, match="the key 'use_ave' is unknown.*did you mean 'use_avg'"):
            qconfig = mlu_quantize.compose_qconfig({"use_ave": True, "iteration": 5, "mean": None}, "int8")
        assert (qconfig.scheme.use_avg, qconfig.scheme.iteration) == (False, 5)

    def test_firstconv_is_off_unless_mean_and_std_are_given(self):
        compose = mlu_quantize.compose_qconfig
        assert compose().scheme.firstconv is False
        assert compose({"mean": [0.5], "std": [0.5]}).scheme.firstconv is True
        assert compose({"mean": [0.5], "std": [0.5], "firstconv": False}).scheme.firstconv is False
        with pytest.warns(UserWarning, match="only divides images by 255"):
            assert compose({"mean": torch.zeros(3), "std": (1, 1, 1)}).scheme.firstconv is True

    def test_the_steps_by_hand(self):
        model, qconfig = net(), mlu_quantize.compose_qconfig(None, "int8")
        mlu_quantize.propagate_qconfig_(model, qconfig)
        mlu_quantize.add_observer_(model)
        made = mlu_quantize.convert(model)
        made(IMAGES)
        assert "conv1.scale" in made.state_dict()
        assert type(model.conv1) is nn.Conv2d
        assert type(mlu_quantize.swap_module(model.conv1)) is cnq.MLUConv2d
        assert mlu_quantize.swap_module(model.dropout1) is model.dropout1

    def test_constants_of_training(self):
        conv, matmul = mlu_quantize.ConvQuantifyParams(), mlu_quantize.MatmulQuantifyParams()
        assert (conv.th, matmul.th) == (0.03, 0.01)
        conv.set_bitwidth(16, 31)
        conv.set_hyperparam(alpha=0.05)
        assert (conv.init_bitwidth, conv.max_bitwidth, conv.alpha) == (16, 31, 0.05)
        with pytest.raises(ValueError, match="no constant 'a'"):
            conv.set_hyperparam(a=1)


class TestFlows:
    """What the vendor's documents show."""

    def test_the_guide_saves_before_the_model_saw_anything(self):
        for _ in range(3):  # as often as one likes in a process
            float_net = net()
            scheme = {"mean": [0], "std": [1 / 255], "firstconv": True}
            generated = quantize_dynamic_mlu(float_net, scheme, dtype="int8", gen_quant=True)
            with pytest.warns(UserWarning, match=r"the input of '\w+' was not observed"):
                state = through_a_file(generated.state_dict())
            assert state["conv1.input_std"].tolist() == [[[[1.0]]]]
            model = quantize_dynamic_mlu(float_net)
            model.load_state_dict(state)
            output = model.to(mlu_model.mlu_device())(IMAGES.to(mlu_model.mlu_device()))
            assert output.cpu().isfinite().all()

    @pytest.mark.parametrize("dtype", ["int8", "int16"])
    @pytest.mark.parametrize("per_channel", [False, True])
    def test_generate_save_load_run(self, dtype, per_channel):
        float_net = net().eval()
        scheme = {"mean": [0.5], "std": [0.25], "firstconv": True, "per_channel": per_channel}
        generated = quantize_dynamic_mlu(float_net, scheme, dtype=dtype, gen_quant=True)
        generated(IMAGES)
        model = quantize_dynamic_mlu(net())
        model.load_state_dict(through_a_file(generated.state_dict()))
        assert torch.equal(model(IMAGES), float_net(IMAGES))  # the host computes in float
        raw = (IMAGES * 0.25 + 0.5) * 255
        output = model.to("mlu")(raw.to("mlu"))
        error = (output.cpu() - float_net(IMAGES)).square().mean()
        assert error < (1e-3 if dtype == "int8" else 1e-7)
        assert not torch.equal(output.cpu(), float_net(raw))

    @traces
    @pytest.mark.parametrize("dtype", ["int8", "int16"])
    @pytest.mark.parametrize("per_channel", [False, True])
    @pytest.mark.parametrize("traced_on", ["cpu", "mlu"])
    def test_a_traced_model_returns_the_same_numbers(self, dtype, per_channel, traced_on):
        scheme = {"mean": [0.5], "std": [0.25], "per_channel": per_channel}
        generated = quantize_dynamic_mlu(net(), scheme, dtype=dtype, gen_quant=True)
        generated(IMAGES)
        model = quantize_dynamic_mlu(net())
        model.load_state_dict(generated.state_dict())
        with torch.no_grad():
            eager = copy.deepcopy(model).to("mlu")(IMAGES.to("mlu"))
            traced = torch.jit.trace(model.to(traced_on), IMAGES.to(traced_on), check_trace=False)
            traced.to("mlu")
            for _ in range(3):  # later calls run an optimized graph
                assert torch.equal(traced(IMAGES.to("mlu")).cpu(), eager.cpu())
            file = io.BytesIO()
            torch.jit.save(traced, file)
            file.seek(0)
            again = torch.jit.load(file, map_location="mlu")
            assert torch.equal(again(IMAGES.to("mlu")).cpu(), eager.cpu())

    @traces
    @pytest.mark.parametrize("dtype", ["int8", "int16"])
    def test_half_of_a_traced_model_keeps_the_scales(self, dtype):
        class TestModel(nn.Module):
            def __init__(self, in_channels):
                super().__init__()
                conv1 = nn.Conv2d(in_channels, 16, 3, 1, 0, 1, 1, bias=False)
                bn1 = nn.BatchNorm2d(16, affine=False)
                self.block1 = nn.Sequential(conv1, bn1, nn.ReLU(inplace=False))

            def forward(self, x):
                y = self.block1(x)
                return torch.transpose(F.max_pool2d(y + y, 2, stride=None), 0, 3)

        torch.manual_seed(0)
        model, input1 = TestModel(5).eval().float(), random(1, 5, 24, 24).abs() / 9
        qconfig = {"use_ave": False, "data_scale": 1.0, "mean": None, "std": None, "firstconv": False}
        with pytest.warns(UserWarning, match="'use_ave' is unknown"):
            quantized_model = quantize_dynamic_mlu(model, qconfig, dtype=dtype, gen_quant=True)
        with torch.no_grad():
            quantized_model(input1)
            model_mlu = quantize_dynamic_mlu(model)
            model_mlu.load_state_dict(quantized_model.state_dict())
            scale = model_mlu.block1[0].scale
            assert dtype == "int8" or scale.max() > 65504  # which a half does not hold
            traced_model = torch.jit.trace(model_mlu.to("mlu"), input1.to("mlu"), check_trace=False)
            full = traced_model(input1.to("mlu")).cpu()
            traced_model.half()
            output = traced_model(input1.half().to("mlu"))
            assert output.dtype == torch.float16
            assert torch.allclose(output.cpu().float(), full, atol=2e-2 if dtype == "int8" else 2e-3)
            assert torch.allclose(full, model(input1), atol=2e-2)
            # the module that was traced is half now, too, and knows its scales
            assert torch.equal(model_mlu.state_dict()["block1.0.scale"].cpu(), scale)

    def test_without_the_card_nothing_is_an_integer(self):
        generated = quantize_dynamic_mlu(net(), dtype="int8", gen_quant=True)
        model = net().eval()
        assert torch.equal(generated(IMAGES), model(IMAGES))
        x = IMAGES.clone().requires_grad_()
        run = quantize_dynamic_mlu(net())
        run.load_state_dict(generated.state_dict())
        run(x).sum().backward()  # as a float model does
        assert x.grad is not None
