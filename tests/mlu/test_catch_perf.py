import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import cnmix.torch_mlu
from cnmix import QuantizeConfig
from cnmix.nn import convert
from cnmix.rules import Rule
from cnmix.torch_mlu.cards import find_card
from cnmix.torch_mlu.catch_perf import profiler
from cnmix.torch_mlu.core import mlu_model, mlu_quantize
from cnmix.torch_mlu.cost_model import LAUNCH, Product
from cnmix.torch_mlu.settings import configure, settings

# As the vendor's document has it, whose last line belongs above.
EXAMPLE = """
import torch
import torch_mlu
import torch_mlu.core.mlu_model as ct
import catch_perf
ct.set_cnml_enabled(False)

a = torch.randn(2,2)
b = torch.randn(2,2)
with profiler.profile() as pro: # 开启catchperf监测，监测范围为with上下文
    out = a.to(ct.mlu_device()) + b.to(ct.mlu_device())
    out = torch.abs(out)
print(pro) # 以table形式在屏幕上输出算子的信息（不包含e2e时间）
pro.export_json('./test.json') # 以json形式将监测的信息保存到硬盘（包含e2e时间）
import catch_perf.profiler as profiler
"""

FIXED = QuantizeConfig(mode="fixed_width")


def on_card(*shape, **more):
    return torch.randn(*shape, device="mlu", **more)


def named(pro, name):
    return [each for each in pro.operators if each.name == name]


def test_the_vendors_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(EXAMPLE, {"profiler": profiler})
    printed = capsys.readouterr().out.splitlines()
    assert "estimates for MLU370" in printed[0]
    assert [line.split()[0] for line in printed[2:]] == ["aten::_copy_from"] * 2 + ["aten::add", "aten::abs"]
    written = json.loads((tmp_path / "test.json").read_text())
    assert [each["name"] for each in written["operators"]] == [line.split()[0] for line in printed[2:]]
    assert written["e2e"]["host_time_us"] >= sum(each["host_time_us"] for each in written["operators"]) > 0
    assert written["e2e"]["device_time_estimate_us"] == pytest.approx(10, rel=1e-3)


def test_the_vendors_names_are_these_modules():
    import catch_perf
    import catch_perf.profiler as theirs
    from catch_perf import profiler as again

    assert catch_perf.profiler is theirs is again is profiler


def test_importing_the_package_loads_no_profiler():
    code = "import sys, cnmix.torch_mlu; sys.exit(any('catch_perf' in name for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_inputs_are_described_by_name_shape_dtype_and_dims():
    a, b = on_card(3, 4), on_card(4, 5)
    with profiler.profile() as pro:
        torch.addmm(on_card(5), a, b)
        torch.cat([a.half(), a.half()])
    (product,) = named(pro, "aten::addmm")
    assert product.inputs == (("self", (5,), "float32"), ("mat1", (3, 4), "float32"), ("mat2", (4, 5), "float32"))
    assert [x.dim for x in product.inputs] == [1, 2, 2]
    assert product.estimate.products == (Product(60, "float32", "float32"),)
    (joined,) = named(pro, "aten::cat")
    assert joined.inputs == (("tensors[0]", (3, 4), "float16"), ("tensors[1]", (3, 4), "float16"))
    line = next(line for line in str(pro).splitlines() if line.startswith("aten::addmm"))
    assert " ".join(line.split()[3:]) == "5, 3×4, 4×5 float32, float32, float32 1, 2, 2 float32 × float32"


def test_many_inputs_are_shortened_in_the_table_and_whole_in_json():
    with profiler.profile() as pro:
        torch.cat([on_card(2)] * 7)
    assert "2, 2, 2, 2 … 3 more" in str(pro)
    assert len(named(pro, "aten::cat")[0].as_dict()["inputs"]) == 7


@pytest.mark.parametrize(
    ("emulated", "in_float", "operands"),
    [("MLU370", True, "float32"), ("MLU370", False, "int31"), ("MLU270", False, "int31"), ("MLU270", True, "int31")],
)
def test_the_estimate_is_of_the_emulated_card_and_its_mode(emulated, in_float, operands):
    a = on_card(64, 64)
    cnmix.torch_mlu.install(card_name=emulated)
    mlu_model.enable_floating_point_calculation(in_float)
    with profiler.profile() as pro:
        a @ a
    assert pro.card == emulated
    assert pro.operators[0].operands == f"{operands} × {operands}"


@pytest.mark.parametrize("bits", [8, 16, 31])
def test_a_width_that_the_script_sets_for_float_products_counts(bits):
    mlu_model.set_quantized_bitwidth(bits)
    with profiler.profile("MLU270") as pro:
        on_card(4, 4) @ on_card(4, 4)
        on_card(4, 4).half() @ on_card(4, 4).half()
    halves = min(bits, 16)
    assert [each.operands for each in named(pro, "aten::mm")] == [
        f"int{bits} × int{bits}",
        f"int{halves} × int{halves}",
    ]


@pytest.fixture(autouse=True)
def float_products_as_before():
    before = settings()
    yield
    configure(floating=before.floating, product_bits=before.product_bits)


def test_another_card_can_be_estimated_than_the_emulated_one():
    x = on_card(1000, 1000)
    times = {}
    for name in ("MLU220", "MLU270", "MLU290", "MLU370", "MLU590"):
        with profiler.profile(card=name) as pro:
            x.relu()
        times[name] = pro.device_time
        assert times[name] == pytest.approx(8e6 / find_card(name).bandwidth + LAUNCH)
        assert f"estimates for {name}" in str(pro)
        assert find_card(name).note in str(pro)
    assert times["MLU220"] > times["MLU270"] > times["MLU370"] > times["MLU290"]


def test_an_unknown_card_is_refused():
    with pytest.raises(ValueError, match="there is no card 'MLU100'"):
        profiler.profile(card="MLU100")


@pytest.fixture
def quantized():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 5))
    convert(net, FIXED.replace(bitwidth=16))
    return net.to("mlu")


def test_quantized_modules_have_the_widths_that_they_ran_with(quantized):
    x = torch.randn(2, 4, 8, 8).to("mlu")
    with profiler.profile("MLU270") as pro:
        y = quantized(x)
        y.sum().backward()
    products = {each.name.removeprefix("cnmix::quantize_"): each for each in pro.operators if "quantize" in each.name}
    assert list(products) == ["convolution", "matmul", "matmul_backward", "convolution_backward"]
    macs = {"convolution": 2 * 8 * 9 * 4 * 9, "matmul": 2 * 72 * 5}
    for name, each in products.items():
        operands, macs_of_each = ("int16", "int16"), macs[name.partition("_")[0]]
        # The first layer's input needs no gradient.
        times = 2 if name == "matmul_backward" else 1
        assert each.estimate.products == (Product(macs_of_each, *operands),) * times
    assert products["matmul"].inputs[1] == ("weight", (5, 72), "float32")
    floats = 4 * (2 * 72 + 5 * 72 + 5 + 2 * 5)
    assert products["matmul"].estimate.traffic == floats + 2 * (2 * 72 + 5 * 72)


def test_mixed_widths_are_seen():
    linear = nn.Linear(6, 4)
    convert(linear, FIXED, rules=[Rule(operands="grad_output", settings={"bitwidth": 16})])
    linear.to("mlu")
    with profiler.profile("MLU270") as pro:
        linear(on_card(3, 6, requires_grad=True)).sum().backward()
    forward, backward = (each for each in pro.operators if "quantize" in each.name)
    assert forward.operands == "int8 × int8"
    assert {tuple(sorted(each[1:])) for each in backward.estimate.products} == {("int16", "int8")}
    rate = find_card("MLU270").rate("int16", "int16")
    assert backward.estimate.compute == pytest.approx(2 * 3 * 6 * 4 / rate)


@pytest.mark.parametrize("bits", [8, 16])
def test_modules_quantized_for_inference_have_the_width_of_their_scales(bits):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    images = torch.randn(2, 3, 8, 8)
    measured = mlu_quantize.quantize_dynamic_mlu(net, {"iteration": 1}, dtype=f"int{bits}", gen_quant=True)
    measured(images)
    ready = mlu_quantize.quantize_dynamic_mlu(net)
    ready.load_state_dict(measured.state_dict())
    ready.to("mlu")
    images = images.to("mlu")
    with profiler.profile("MLU220") as pro, torch.no_grad():
        ready(images)
    kind = f"int{bits}"
    found = [each.estimate.products for each in pro.operators if each.operands]
    assert found == [(Product(2 * 8 * 36 * 27, kind, kind),), (Product(2 * 288 * 4, kind, kind),)]


@pytest.mark.parametrize("module", [nn.LSTM(4, 5), nn.GRUCell(4, 5), nn.MultiheadAttention(4, 2)])
def test_layers_of_several_products_are_counted_whole(module):
    macs = {nn.LSTM: 3 * 2 * 20 * 9, nn.GRUCell: 3 * 15 * 9, nn.MultiheadAttention: 3 * 2 * 4 * 16 + 2 * 2 * 9 * 4}
    convert(module, FIXED)
    module.to("mlu")
    x = on_card(3, 4) if isinstance(module, nn.GRUCell) else on_card(3, 2, 4)
    args = (x, x, x) if isinstance(module, nn.MultiheadAttention) else (x,)
    with profiler.profile() as pro:
        module(*args)
    found = sum(each.estimate.macs for each in pro.operators)
    kind = next(kind for kind in macs if isinstance(module, kind))
    assert found == macs[kind]


def test_a_float_model_on_the_200_series_multiplies_as_int31():
    layer = nn.Conv2d(3, 4, 3).to("mlu")
    with profiler.profile("MLU290") as pro:
        layer(on_card(2, 3, 8, 8)).sum().backward()
    assert {each.operands for each in pro.operators} == {"", "int31 × int31"}
    macs = 2 * 4 * 36 * 27
    assert [each.estimate.macs for each in pro.operators if each.operands] == [macs, macs]


def test_views_memory_and_host_operators_are_left_out():
    x = on_card(4, 3)
    with profiler.profile() as pro:
        x.t().reshape(3, 4)[1].expand(2, 4).detach()
        torch.empty(3, device="mlu")
        torch.ones(3) + torch.ones(3)
    assert [each.name for each in pro.operators] in ([], ["aten::_copy_from"])


def test_copies_between_host_and_card_have_no_estimate():
    x = on_card(4)
    with profiler.profile() as pro:
        x.cpu()
        x.sum().item()
    assert [each.estimate is None for each in pro.operators] == [True, False, True]
    assert pro.operators[0].as_dict()["device_time_estimate_us"] is None
    assert pro.device_time == pytest.approx(LAUNCH, rel=1e-3)
    assert "–" in str(pro)


def test_it_can_be_printed_at_any_time():
    pro = profiler.profile()
    assert "was not entered" in str(pro)
    assert pro.e2e_time == pro.device_time == 0
    with pro:
        on_card(3) + 1
        assert "aten::add" in str(pro)
        before = pro.e2e_time
    after = pro.e2e_time
    assert 0 < before < after == pro.e2e_time
    calls = len(pro.operators)
    on_card(3) + 1
    assert len(pro.operators) == calls


def test_an_exception_inside_comes_through_and_what_ran_is_there():
    x = on_card(3)
    pro = profiler.profile()

    def fail():
        with pro:
            x + 1
            torch.mm(on_card(2, 3), on_card(2, 3))

    with pytest.raises(RuntimeError, match="shape"):
        fail()
    assert named(pro, "aten::add")
    assert not named(pro, "aten::mm")
    with profiler.profile() as other:
        x + 1
    assert len(other.operators) == 1


def test_operators_after_one_that_raised_are_seen():
    x = on_card(2, 3)
    with profiler.profile() as pro:
        with pytest.raises(RuntimeError):
            torch.mm(x, x)
        x + 1
    assert [each.name for each in pro.operators] == ["aten::add"]


def test_operators_after_a_product_that_raised_are_seen(quantized):
    convolution = quantized[0]
    with profiler.profile() as pro:
        with pytest.raises(ValueError, match="smaller than the kernel"):
            convolution(on_card(1, 4, 2, 2))
        convolution(on_card(1, 4, 3, 3))
        on_card(3) + 1
    names = [each.name for each in pro.operators if each.name != "aten::normal_"]
    assert names == ["cnmix::quantize_convolution", "aten::add"]


def test_one_profile_at_a_time():
    with profiler.profile() as pro:
        with pytest.raises(RuntimeError, match="another profile is running"), profiler.profile():
            pass
        on_card(3) + 1
    assert named(pro, "aten::add")
    with pytest.raises(RuntimeError, match="entered once"), pro:
        pass
    with profiler.profile() as pro:
        on_card(3) + 1
    assert named(pro, "aten::add")


def test_averages_add_up():
    x, y = on_card(8, 8), on_card(4, 4)
    with profiler.profile("MLU270") as pro:
        for each in (x, y, x):
            each @ each
            each + 1
        x.half() @ x.half()
    averages = pro.key_averages()
    assert {(row.name, row.operands): row.calls for row in averages if row.name != "aten::_copy_from"} == {
        ("aten::mm", "int31 × int31"): 3,
        ("aten::mm", "int16 × int16"): 1,
        ("aten::add", ""): 3,
    }
    assert sum(row.calls for row in averages) == len(pro.operators)
    assert sum(row.device_time for row in averages) == pytest.approx(pro.device_time)
    assert sum(row.host_time for row in averages) == pytest.approx(sum(each.host_time for each in pro.operators))
    times = [row.device_time for row in averages]
    assert times == sorted(times, reverse=True)
    assert len(str(averages).splitlines()) == 2 + len(averages)
    assert "(estimate)" in str(averages)


def test_averages_of_nothing():
    with profiler.profile() as pro:
        pass
    assert len(pro.key_averages()) == 0
    assert "operator" in str(pro.key_averages())


def test_json_has_every_call_and_says_that_it_estimates(tmp_path):
    with profiler.profile("MLU270") as pro:
        on_card(6, 5) @ on_card(5, 4)
    pro.export_json(tmp_path / "new" / "times.json")
    written = json.loads((tmp_path / "new" / "times.json").read_text())
    assert written["card"] == "MLU270"
    assert "estimates" in written["device_time"]
    assert set(written["e2e"]) == {"host_time_us", "device_time_estimate_us"}
    product = written["operators"][-1]
    assert product["name"] == "aten::mm"
    assert product["products"] == [{"macs": 120, "left": "int31", "right": "int31"}]
    assert product["inputs"][0] == {"name": "self", "shape": [6, 5], "dtype": "float32", "dim": 2}
    assert product["device_time_estimate_us"] == pytest.approx(
        max(product["compute_estimate_us"], product["memory_estimate_us"]) + LAUNCH * 1e6
    )
    assert product["bytes"] == 4 * (30 + 20 + 24)


def test_a_failure_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    with profiler.profile() as pro:
        on_card(3) + 1
    path = tmp_path / "times.json"
    pro.export_json(path)
    before = path.read_text()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(type(path), "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        pro.export_json(path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_results_and_gradients_are_what_they_are_without(quantized):
    x = torch.randn(2, 4, 8, 8).to("mlu")

    def run():
        quantized.zero_grad()
        y = quantized.eval()(x)
        y.square().sum().backward()
        return [y.detach().cpu(), *(p.grad.cpu() for p in quantized.parameters())]

    expected = run()
    with profiler.profile():
        found = run()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
