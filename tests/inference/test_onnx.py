import copy
import sys
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnmix
from cnmix.inference import fuse, load
from cnmix.inference.names import CONVOLUTION, FILTER, LINEAR, MATMUL, STORED_WEIGHTS
from cnmix.inference.onnx import to_onnx
from cnmix.inference.program import run_step

onnx = pytest.importorskip("onnx", reason="writing ONNX files needs onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="agreement with onnxruntime needs onnxruntime")
pytest.importorskip("onnxscript", reason="writing ONNX files needs onnxscript")

UNIT = 2.0**-24  # the largest relative error of rounding to float32


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.LeakyReLU(0.1),
        )
        self.head = nn.Linear(256, 10)

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.first = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.norm(self.first(x))).relu()
        return self.head(self.pool(self.down(x).relu()).flatten(1))


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, image):
        return self.layers(image)


class Mixed(nn.Module):
    """Every kind of product, and float operators of several kinds."""

    def __init__(self):
        super().__init__()
        self.reflected = nn.Conv2d(3, 6, 3, padding="same", padding_mode="reflect")
        self.transposed = nn.ConvTranspose2d(6, 4, 3, 2, 1, 1)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.sequence = nn.Conv1d(4, 6, 3)
        self.rows = nn.Linear(6, 5)

    def forward(self, x):
        y = self.transposed(self.reflected(x)).clamp(-1, 1).exp()
        y = F.interpolate(torch.sigmoid(self.norm(self.grouped(y))), scale_factor=2.0)
        y = torch.cat([y, y * 0.5 - 1], 1)[:, 2:6].flatten(2)
        return F.gelu(self.rows(self.sequence(y).transpose(1, 2))).softmax(-1)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, tokens):
        return self.query(tokens), self.key(tokens)


class Attending(nn.Module):
    """Attention, and a convolution by a weight that is computed."""

    def __init__(self):
        super().__init__()
        self.project, self.head = nn.Linear(8, 24), nn.Linear(8, 5)
        self.register_buffer("blur", torch.full((2, 1, 3), 1 / 3))

    def forward(self, x):
        q, k, v = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in self.project(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = F.conv1d(y.flatten(2), self.blur, padding=1, groups=2).unflatten(-1, (-1, 4))
        return self.head(y.transpose(1, 2).flatten(2))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.memory = nn.GRU(8, 4)

    def forward(self, x):
        return self.memory(x)[0]


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 8, 4))

    def forward(self, x):
        return F.grouped_mm(x, self.experts, offs=torch.tensor([1, 3], dtype=torch.int32))


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return torch.erfinv(self.layer(x).clamp(-0.5, 0.5))


@cache
def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)


def trained(kind, batch, steps=1, **settings):
    """Returns the integer model of a short training run; batch gives the inputs, and labels or None, of a step."""
    torch.manual_seed(0)
    model = kind()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    cnmix.initialize(model, optimizer, opt_level="O1", steps_per_epoch=steps, **settings)
    for step in range(steps):
        x, labels = batch(step)
        y = model(x)
        loss = sum(each.square().mean() for each in ([y] if isinstance(y, torch.Tensor) else y))
        loss = loss if labels is None else F.cross_entropy(y, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return load(kind(), copy.deepcopy({"state_dict": model.state_dict(), "cnmix": cnmix.state_dict(model)}))


def exported(model, x, path):
    fused = fuse(model, x)
    to_onnx(fused, path)
    return fused.first.program


def run(path, x, optimized):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


def bounds(program, x):
    """Returns how far onnxruntime's output may be from the program's, as docs/inference_onnx.md derives it."""
    values = {**program.constants, program.inputs[0]: x}
    bound = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in values.items()}
    for step in program.steps:
        run_step(step, values)
        result, source = values[step.output], step.arguments[0].name
        magnitude, known = result.abs().double(), bound.get(source)
        if step.operator in (LINEAR, CONVOLUTION):
            bound[step.output] = product_bound(step, values, known)
        elif step.operator == "aten.adaptive_avg_pool2d.default":
            run_step(step, bound)
            elements = values[source][0, 0].numel() // result[0, 0].numel()
            sums = F.adaptive_avg_pool2d(values[source].abs().double(), result.shape[2:])
            bound[step.output] += (elements + 1) * UNIT * sums
        elif step.operator in ("aten.mul.Tensor", "aten.add.Tensor", "aten.leaky_relu.default"):
            other = step.arguments[1]
            if step.operator == "aten.mul.Tensor":
                changed = known * values[other.name].abs()
            else:
                changed = known + (bound[other.name] if step.operator == "aten.add.Tensor" else 0)
            bound[step.output] = changed + torch.where(changed > 0, 2 * UNIT * (magnitude + changed), 0.0)
        else:
            assert step.operator.split(".")[1] in ("relu", "max_pool2d", "view", "_unsafe_view", "clone"), step.operator
            run_step(step, bound)
    return bound[program.outputs[0]]


def product_bound(step, values, known):
    bits, position, _, weight_position = step.arguments[-4]
    x, weight = values[step.arguments[0].name].double(), values[step.arguments[1].name].double()
    bias = None if step.arguments[2] is None else values[step.arguments[2].name].double().abs()

    def rounded(each):
        return (each * 2.0**-position).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def multiplied(each, of_bias):
        if step.operator == LINEAR:
            return F.linear(each, weight.abs(), of_bias)
        return F.conv2d(each, weight.abs(), of_bias, *step.arguments[3:7])

    q = rounded(x)
    flipped = torch.maximum((rounded(x + known) - q).abs(), (rounded(x - known) - q).abs())
    scale = 2.0 ** (position + weight_position)
    of_bias = None if bias is None else bias / scale
    sums = multiplied(q.abs() + flipped, of_bias)
    terms = weight[0].numel() + 2
    rounding = torch.zeros_like(sums) if bias is None and sums.max() < 2**24 else terms * 1.001 * UNIT * sums
    return (multiplied(flipped, None) + rounding) * scale


@pytest.mark.parametrize(("kind", "bitwidth"), [(Convolutions, 8), (Residual, 8), (Residual, 16), (Perceptron, 8)])
def test_onnxruntime_agrees(kind, bitwidth, tmp_path):
    images, labels = digits()

    def batch(step):
        rows = torch.arange(step * 128, step * 128 + 128) % len(images)
        return images[rows], labels[rows]

    settings = {"max_bitwidth": 8} if bitwidth == 8 else {"bitwidth": 16, "max_bitwidth": 16}
    model = trained(kind, batch, 30, **settings)
    program = exported(model, images, tmp_path / "x.onnx")
    expected = model(images).detach()
    assert (expected.argmax(1) == labels).float().mean() > 0.8
    for optimized in (False, True):
        (y,) = run(tmp_path / "x.onnx", images, optimized)
        allowed = bounds(program, images)
        difference = (y - expected).abs().double()
        assert bool((difference <= allowed).all())
        assert (y.argmax(1) == expected.argmax(1)).double().mean() >= 0.999


@pytest.mark.parametrize(("bitwidth", "tolerance"), [(8, 1e-6), (16, 1e-4), (31, 1e-5)])
def test_all_kinds_of_products_and_float_operators(bitwidth, tolerance, tmp_path):
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    model = trained(Mixed, lambda step: (x, None), 2, bitwidth=bitwidth, max_bitwidth=bitwidth)
    exported(model, x, tmp_path / "x.onnx")
    (y,) = run(tmp_path / "x.onnx", x, optimized=False)
    torch.testing.assert_close(y, model(x).detach(), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("bitwidth", "tolerance"), [(8, 1e-6), (16, 1e-5), (31, 1e-6)])
def test_products_of_activations(bitwidth, tolerance, tmp_path):
    x = tokens()
    model = trained(Attending, lambda step: (x, None), 2, bitwidth=bitwidth, max_bitwidth=bitwidth)
    program = exported(model, x, tmp_path / "x.onnx")
    assert sorted(step.operator for step in program.steps if step.operator in STORED_WEIGHTS) == [
        FILTER, LINEAR, LINEAR, MATMUL, MATMUL
    ]  # fmt: skip
    (y,) = run(tmp_path / "x.onnx", x, optimized=False)
    torch.testing.assert_close(y, model(x).detach(), rtol=0, atol=tolerance)
    if bitwidth == 8:
        kinds = [node.op_type for node in onnx.load(tmp_path / "x.onnx").graph.node]
        # Of the convolution and each matrix product both operands, of the linear layers the input.
        assert (kinds.count("QuantizeLinear"), kinds.count("DequantizeLinear")) == (8, 10)


def test_products_without_onnx_form_are_named(tmp_path):
    x = tokens()
    for kind, given, settings, message in (
        (Recurrent, x, {}, "'memory' multiplies a recurrent layer, in integers, which ONNX has no operator for"),
        (
            Experts,
            x[0],
            {},
            r"grouped_mm\S* multiplies groups of rows, each by a matrix of its own, in integers, which",
        ),
        (Attending, x, {"per_entry": True}, "quantizes at the position that fits each matrix anew"),
        (Attending, torch.zeros(3, 6, 8), {}, "'project' quantizes at the position that fits each tensor anew"),
    ):
        if kind is Experts and not hasattr(F, "grouped_mm"):
            continue
        with pytest.raises(ValueError, match=message):
            exported(trained(kind, lambda step, given=given: (given, None), **settings), given, tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def tokens():
    return torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1))


def test_the_file(tmp_path):
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    model = trained(Shared, lambda step: (x, None))
    exported(model, x, tmp_path / "new" / "x.onnx")
    file = onnx.load(tmp_path / "new" / "x.onnx")
    assert [each.name for each in file.graph.input] == ["tokens"]
    assert [each.name for each in file.graph.output] == ["output_0", "output_1"]
    assert (file.producer_name, file.producer_version) == ("cnmix", cnmix.__version__)
    assert {each.key: each.value for each in file.metadata_props} == {"cnmix": cnmix.__version__}
    assert str(tmp_path.parent) not in str(file)
    kinds = [node.op_type for node in file.graph.node]
    assert kinds.count("QuantizeLinear") == 1  # two layers take one tensor in one format
    assert kinds.count("DequantizeLinear") == 3
    assert "Transpose" not in kinds
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in file.graph.initializer}
    scales = [constants[node.input[1]].item() for node in file.graph.node if node.op_type.endswith("quantizeLinear")]
    assert all(torch.frexp(torch.tensor(scale)).mantissa == 0.5 for scale in scales)
    assert sum(each.dtype == "int8" and each.size == 16 for each in constants.values()) == 2
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["x.onnx"]


def test_what_has_no_onnx_form_is_named(tmp_path):
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"Odd has no ONNX form.*erf_inv"):
        exported(trained(Odd, lambda step: (x, None)), x, tmp_path / "x.onnx")
    with pytest.raises(ValueError, match="'query' rounds its input by 'half_up', and ONNX"):
        exported(trained(Shared, lambda step: (x, None), rounding="half_up"), x, tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_is_to_be_installed_is_named(tmp_path, monkeypatch):
    x = torch.randn(2, 3, 4)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match=r"onnxscript is missing.*cnmix\[onnx\]"):
        exported(trained(Shared, lambda step: (x, None)), x, tmp_path / "x.onnx")
