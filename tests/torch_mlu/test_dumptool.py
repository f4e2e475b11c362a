import importlib
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import cnmix
import cnmix.torch_mlu
from cnmix.torch_mlu.core import dumptool
from cnmix.torch_mlu.core.dumptool import Dumper, dump_cnnl_gencase

CARD = "mlu"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CNNL_GEN_CASE", raising=False)


def folders(path: str | Path) -> list[str]:
    names = [each.name for each in Path(path).iterdir() if each.is_dir()]
    return sorted(names, key=lambda name: int(name.split("_")[0]))


def files(path: str | Path) -> list[str]:
    return sorted(each.name for each in Path(path).iterdir() if each.is_file())


def lines(path: str | Path) -> list[str]:
    return Path(path).read_text().splitlines()


def assert_is(path: Path, expected: Tensor) -> None:
    """Checks that a file of level 2 has exactly this tensor, to the six digits that are written."""
    header, *values = lines(path)
    found = re.fullmatch(r"Tensor : Type = (\w+) : Shape = (\[.*\]) : Stride = (\[.*\]) : Dumped = (\d+)", header)
    assert found is not None, header
    assert found[2] == str(list(expected.shape))
    assert int(found[4]) == expected.numel() == len(values)
    written = torch.tensor([float(each) for each in values], dtype=torch.float64)
    torch.testing.assert_close(written, expected.detach().cpu().double().reshape(-1), rtol=1e-5, atol=0, equal_nan=True)


def dumped(function: Any, **options: Any) -> Path:
    with Dumper("here", **options) as dumper:
        function()
    return Path(dumper.dump_dir)


def one_tensor(x: Tensor, level: int = 0) -> list[str]:
    """Returns the lines of a tensor of the card, as an argument."""
    return lines(dumped(lambda: x == x, level=level) / "1_eq" / "mlu_self")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float32, "Float"),
        (torch.float64, "Double"),
        (torch.float16, "Half"),
        (torch.bfloat16, "BFloat16"),
        (torch.uint8, "Byte"),
        (torch.int8, "Char"),
        (torch.int16, "Short"),
        (torch.int32, "Int"),
        (torch.int64, "Long"),
        (torch.bool, "Bool"),
    ],
)
def test_header_of_a_tensor(dtype: torch.dtype, name: str) -> None:
    x = torch.ones(3, 4, dtype=dtype, device=CARD).t()
    header, *values = one_tensor(x)
    assert header == f"Tensor : Type = {name} : Shape = [4, 3] : Stride = [1, 4] : Dumped = 10"
    assert values == ["1"] * 10


def test_levels() -> None:
    x = torch.arange(-6.0, 6.0, device=CARD)
    assert one_tensor(x, 0) == [
        "Tensor : Type = Float : Shape = [12] : Stride = [1] : Dumped = 10",
        *(str(i) for i in range(-6, 4)),
    ]
    assert one_tensor(x, 1) == ["Tensor : Type = Float : Shape = [12] : Stride = [1] : Dumped = 1", "36"]
    assert one_tensor(x, 2)[0].endswith("Dumped = 12")
    assert len(one_tensor(x, 2)) == 13
    assert one_tensor(x[:3], 0)[0].endswith("Dumped = 3")
    assert one_tensor(x > 0, 1)[1] == "5"
    assert one_tensor(torch.tensor([-(2**40), 1], device=CARD), 1)[1] == str(2**40 + 1)
    assert one_tensor(torch.full((4,), -128, dtype=torch.int8, device=CARD), 1)[1] == "512"
    assert one_tensor(torch.full((3,), 60000.0, dtype=torch.float16, device=CARD), 1)[1] == "180000"


def test_numbers_are_written_with_six_digits() -> None:
    x = torch.tensor([-6.179371, 1 / 3, 1e-7, 1.23456789e10, math.inf, -math.inf, math.nan, -0.0], device=CARD)
    assert one_tensor(x)[1:] == ["-6.17937", "0.333333", "1e-07", "1.23457e+10", "inf", "-inf", "nan", "-0"]
    assert one_tensor(torch.tensor([True, False], device=CARD))[1:] == ["1", "0"]
    assert one_tensor(torch.tensor([1.5 - 2j], device=CARD)) == [
        *("Tensor : Type = ComplexFloat : Shape = [1] : Stride = [1] : Dumped = 1", "(1.5,-2)")
    ]
    assert one_tensor(torch.tensor(2.5, device=CARD)) == [
        *("Tensor : Type = Float : Shape = [] : Stride = [] : Dumped = 1", "2.5")
    ]


@given(st.lists(st.floats(width=32), min_size=1, max_size=30))
def test_what_is_written_reads_back(values: list[float]) -> None:
    x = torch.tensor(values)
    written = torch.tensor([float(each) for each in "".join(dumptool._lines(x.tolist())).split()])
    torch.testing.assert_close(written, x, rtol=1e-5, atol=1e-44, equal_nan=True)


def test_many_values_are_written_whole() -> None:
    x = torch.arange(150_000, device=CARD)
    assert one_tensor(x, 2)[1:] == [str(i) for i in range(150_000)]


def test_other_headers() -> None:
    x = torch.ones(2, 6, device=CARD)
    here = dumped(
        lambda: (
            x.add(2, alpha=3),
            torch.cat([x, x[:0]]),
            torch.split(x, [4, 2], dim=1),
            x[torch.tensor([1], device=CARD), :],
            torch.max(x, dim=1),
            x.sum(),
            x.normal_(generator=torch.Generator(CARD)),
        )
    )
    by_name = {name.split("_", 1)[1]: here / name for name in folders(here)}
    assert lines(by_name["add"] / "mlu_alpha") == ["Scalar : Type = Long", "3"]
    assert lines(by_name["add"] / "mlu_other") == ["Scalar : Type = Long", "2"]
    cat = lines(by_name["cat"] / "mlu_tensors")
    assert cat[0] == "TensorList : Size = 2"
    assert cat[-1] == "Tensor : Type = Empty"
    assert len(cat) == 13
    index = lines(by_name["index"] / "mlu_indices")
    assert index[0] == "List : Size = 1"
    assert index[1].startswith("Tensor : Type = Long")
    assert lines(by_name["max"] / "cnnl_result")[0] == "Tuple : Size = 2"
    assert lines(by_name["sum"] / "mlu_dtype") == ["Optional : None"]
    assert lines(by_name["normal_"] / "mlu_generator") == ["Generator : "]
    assert lines(by_name["normal_"] / "mlu_mean") == ["Scalar : Type = Double", "0"]


def test_headers_of_results() -> None:
    x = torch.ones(1, 1, 3, 3, device=CARD, requires_grad=True)
    weight = torch.ones(1, 1, 2, 2, device=CARD)
    here = dumped(lambda: F.conv2d(x, weight).sum().backward())
    backward = next(here / name for name in folders(here) if "convolution_backward" in name)
    result = lines(backward / "cnnl_result")
    assert result[0] == "Tuple : Size = 3"
    assert result[1].startswith("Tensor : Type = Float : Shape = [1, 1, 3, 3]")
    assert result[-2:] == ["Tensor : Type = Undefined"] * 2
    assert lines(backward / "mlu_output_mask") == ["Array : Size = 3", "1", "0", "0"]
    item = dumped(lambda: x.sum().item())
    assert folders(item) == ["1_sum", "2_local_scalar_dense"]
    assert lines(item / "2_local_scalar_dense" / "cnnl_result") == ["Scalar : Type = Double", "9"]
    assert files(item / "2_local_scalar_dense") == ["cnnl_result", "mlu_self"]
    vector = dumped(lambda: torch._foreach_add([x.detach()], [x.detach()]), level=1)
    assert lines(vector / folders(vector)[0] / "cnnl_result")  # written, whichever form it is seen in


def test_other_arguments() -> None:
    x = torch.ones(2, device=CARD)
    here = dumped(
        lambda: (
            torch.linspace(0, 1, 3, device="mlu:0", dtype=torch.float64),
            torch.div(x, x, rounding_mode="floor"),
            torch.empty_like(x, memory_format=torch.contiguous_format).abs(),
        )
    )
    linspace, div, _ = (here / name for name in folders(here))
    assert lines(linspace / "mlu_dtype") == ["ScalarType : Double"]
    assert lines(linspace / "mlu_device") == ["Device : mlu:0"]
    assert lines(div / "mlu_rounding_mode") == ["String : floor"]


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)
    )


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([1, 2])


def test_a_training_step_is_written_whole() -> None:
    net = small_net().to(CARD)
    before = {name: each.clone() for name, each in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x, y = (each.to(CARD) for each in batch())
    outputs = []
    handles = [each.register_forward_hook(lambda _m, _x, output: outputs.append(output)) for each in net]
    with Dumper("step", level=2, use_cpu=True):
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
    for handle in handles:
        handle.remove()
    step = Path("step")
    names = folders(step)
    assert [int(name.split("_")[0]) for name in names] == list(range(1, len(names) + 1))
    plain = [name.split("_", 1)[1] for name in names]
    assert [name for name in plain if name not in ("view", "as_strided")] == [
        *("convolution_overrideable", "add_", "native_batch_norm", "relu", "max_pool2d_with_indices", "addmm"),
        *(
            "log_softmax",
            "nll_loss_forward",
            "fill_",
            "nll_loss_backward",
            "log_softmax_backward_data",
            "mm",
            "mm",
            "sum",
        ),
        *("max_pool2d_with_indices_backward", "threshold_backward", "native_batch_norm_backward"),
        *("convolution_backward_overrideable", *["add_"] * 6),
    ]
    convolution = step / "1_convolution_overrideable"
    assert files(convolution) == [
        *("cnnl_result", "cpu_result", "mlu_bias", "mlu_dilation", "mlu_groups", "mlu_input", "mlu_output_padding"),
        *("mlu_padding", "mlu_stride", "mlu_transposed", "mlu_weight"),
    ]
    assert_is(convolution / "mlu_input", x)
    assert_is(convolution / "mlu_weight", before["0.weight"])
    assert_is(convolution / "mlu_bias", before["0.bias"])
    assert_is(convolution / "cnnl_result", outputs[0])
    assert_is(convolution / "cpu_result", outputs[0])
    place = {name: step / names[plain.index(name)] for name in plain}
    assert lines(place["native_batch_norm"] / "cnnl_result")[0] == "Tuple : Size = 3"
    assert_is(place["relu"] / "mlu_self", outputs[1])
    assert_is(place["relu"] / "cnnl_result", outputs[2])
    assert_is(place["addmm"] / "cnnl_result", outputs[5])
    assert_is(place["log_softmax"] / "mlu_self", outputs[5])
    assert_is(place["log_softmax"] / "cnnl_result", F.log_softmax(outputs[5], 1))
    assert lines(place["nll_loss_forward"] / "cnnl_result")[2] == f"{loss.item():g}"
    assert_is(place["sum"] / "cnnl_result", net[5].bias.grad[None])
    gradients = lines(place["convolution_backward_overrideable"] / "cnnl_result")
    assert gradients[:2] == ["Tuple : Size = 3", "Tensor : Type = Undefined"]
    written = [float(each) for each in gradients[-4:]]
    torch.testing.assert_close(torch.tensor(written), net[0].bias.grad.cpu(), rtol=1e-4, atol=1e-7)
    last = step / names[-1]
    assert files(last) == ["cnnl_result", "mlu_alpha", "mlu_other", "mlu_self"]
    assert_is(last / "mlu_self", before["5.bias"])
    assert_is(last / "mlu_other", net[5].bias.grad)
    assert_is(last / "cnnl_result", net[5].bias)


def test_in_the_middle_of_a_training_loop() -> None:
    def train(dumps: bool) -> list[Tensor]:
        net = nn.Sequential(small_net(), nn.Dropout(0.5)).to(CARD)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        debug_iter = [1, 2]
        for i in range(4):
            x, y = (each.to(CARD) for each in batch(i))
            with Dumper(dump_dir=f"./dump_iter_{i}", enable=dumps and i in debug_iter, use_cpu=True, level=2):
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
        return [each.cpu() for each in net.state_dict().values()]

    plain, watched = train(False), train(True)
    assert sorted(os.listdir()) == ["dump_iter_1", "dump_iter_2"]
    assert folders("dump_iter_1") == folders("dump_iter_2")
    assert len(folders("dump_iter_1")) > 50
    for a, b in zip(plain, watched, strict=True):
        assert torch.equal(a, b)


def test_an_adaptively_quantized_step() -> None:
    def train(dumps: bool) -> list[Tensor]:
        net = small_net().to(CARD)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net, optimizer = cnmix.initialize(net, optimizer, opt_level="O1")
        x, y = (each.to(CARD) for each in batch())
        for i in range(2):
            with Dumper(f"quantized{i}", enable=dumps, use_cpu=True, level=2):
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
        return [each.cpu() for each in net.state_dict().values()]

    for a, b in zip(train(False), train(True), strict=True):
        assert torch.equal(a, b)
    products = [name for name in folders("quantized0") if "quantize_" in name]
    assert [name.split("_", 1)[1] for name in products] == [
        *("quantize_convolution", "quantize_matmul", "quantize_matmul_backward", "quantize_convolution_backward")
    ]
    convolution = Path("quantized0") / products[0]
    assert {"cnnl_result", "cpu_result", "mlu_input", "mlu_weight", "mlu_bias", "mlu_stride"} <= set(files(convolution))
    net, (x, _) = small_net(), batch()
    assert_is(convolution / "mlu_input", x)
    assert_is(convolution / "cpu_result", net[0](x))
    assert lines(convolution / "cnnl_result") != lines(convolution / "cpu_result")
    matmul = Path("quantized0") / products[1]
    assert {"cnnl_result", "cpu_result", "mlu_input", "mlu_weight", "mlu_bias"} == set(files(matmul))


def test_products_of_the_200_series() -> None:
    importlib.import_module("cnmix.torch_mlu.fixed_products")
    cnmix.torch_mlu.install(card_name="MLU270")
    net = small_net().to(CARD)
    x, y = (each.to(CARD) for each in batch())
    with Dumper("fixed", use_cpu=True, level=2):
        F.cross_entropy(net(x), y).backward()
    names = folders("fixed")
    for name in ("convolution_overrideable", "addmm", "mm", "convolution_backward_overrideable"):
        folder = next(Path("fixed") / each for each in names if each.split("_", 1)[1] == name)
        assert {"cnnl_result", "cpu_result"} <= set(files(folder))
    assert_is(Path("fixed") / names[0] / "cpu_result", small_net()[0](batch()[0]))


def test_use_cpu_changes_nothing() -> None:
    x = torch.randn(64, device=CARD)
    running = torch.zeros(4, device=CARD)

    def compute() -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        y = F.dropout(x, 0.5)
        z = torch.rand_like(x)
        F.batch_norm(x.view(4, 4, 4), running, torch.ones(4, device=CARD), training=True)
        return y, z, torch.randn(3, device=CARD), torch.randn(3)

    plain = compute()
    after_one = running.clone()
    running.zero_()
    with Dumper("here", use_cpu=True, level=2):
        watched = compute()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert torch.equal(running, after_one)
    here = Path("here")
    dropout = next(here / name for name in folders(here) if (here / name / "cpu_result").exists())
    assert lines(dropout / "cpu_result") == lines(dropout / "cnnl_result")


def test_use_cpu_of_views_sees_the_memory_around_them() -> None:
    x = torch.arange(24.0, device=CARD)[4:].view(4, 5)
    here = dumped(lambda: x[1:].t()[1:].as_strided((2, 2), (5, 1), 3), use_cpu=True, level=2)
    for name in folders(here):
        assert lines(here / name / "cpu_result") == lines(here / name / "cnnl_result")


def test_use_cpu_leaves_out_what_is_written_into_and_what_fails() -> None:
    x = torch.ones(3, device=CARD)
    library = torch.library.Library("cnmix_dumped", "DEF")
    library.define("card_only(Tensor x) -> Tensor")
    library.impl("card_only", lambda x: x + 1, "PrivateUse1")
    try:
        here = dumped(
            lambda: (x.add_(1), torch.add(x, x, out=x), x.abs(), torch.ops.cnmix_dumped.card_only(x)), use_cpu=True
        )
    finally:
        library._destroy()
    assert folders(here) == ["1_add_", "2_add", "3_abs", "4_card_only"]
    assert [(here / name / "cpu_result").exists() for name in folders(here)] == [False, False, True, False]
    assert files(here / "4_card_only") == ["cnnl_result", "mlu_x"]
    assert folders(here / "4_card_only") == ["1_add"]
    assert (here / "4_card_only" / "1_add" / "cpu_result").exists()


def test_copies_and_allocations_are_neither_written_nor_numbered() -> None:
    x = torch.ones(3, device=CARD)
    here = dumped(lambda: (torch.empty(3, device=CARD), x.clone().copy_(x), x.cpu(), torch.ones(2).to(CARD).abs()))
    assert folders(here) == ["1_abs"]


def test_what_the_host_computes_is_not_written() -> None:
    assert folders(dumped(lambda: torch.ones(3, 3) @ torch.ones(3, 3))) == []


def test_folders() -> None:
    x = torch.ones(1, device=CARD)
    for expected in ("dump", "dump1", "dump2"):
        with Dumper() as dumper:
            x.abs()
        assert Path(dumper.dump_dir).name == expected
        assert folders(expected) == ["1_abs"]
    for given_dir, expected in (("a/b//", "a/b"), ("a/b", "a/b1"), ("", "dump3"), (Path("p"), "p")):
        with Dumper(given_dir):
            x.abs()
        assert folders(expected) == ["1_abs"]
    Path("file").write_text("kept")
    with Dumper("file"):
        x.abs()
    assert folders("file1") == ["1_abs"]
    assert Path("file").read_text() == "kept"


def test_disabled_makes_nothing() -> None:
    with Dumper("never", enable=False, use_cpu=True, level=2) as dumper:
        torch.ones(1, device=CARD).abs()
    dumper.start()
    dumper.end()
    assert os.listdir() == []


def test_start_and_end() -> None:
    x = torch.ones(1, device=CARD)
    dumper = Dumper("begun")
    x.abs()
    dumper.start()
    dumper.start()
    x.neg()
    dumper.end()
    dumper.end()
    x.exp()
    assert folders("begun") == ["1_neg"]
    dumper.start()
    x.exp()
    dumper.end()
    assert folders("begun1") == ["1_exp"]


def test_one_within_another() -> None:
    x = torch.ones(1, device=CARD)
    with Dumper("outer"):
        x.abs()
        with Dumper("inner"):
            x.neg()
        x.exp()
    assert folders("outer") == ["1_abs", "2_neg", "3_exp"]
    assert folders("inner") == ["1_neg"]


def test_the_working_directory_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    with Dumper("fixed"):
        monkeypatch.chdir(tmp_path / "other")
        torch.ones(1, device=CARD).abs()
    assert "1_fill_" in folders(tmp_path / "fixed")
    assert os.listdir() == []


def test_it_ends_where_the_script_raises() -> None:
    x = torch.ones(1, device=CARD)
    with pytest.raises(ZeroDivisionError), Dumper("raised"):
        1 / 0  # noqa: B018
    x.abs()
    assert folders("raised") == []


@pytest.mark.parametrize("level", [3, -1, "0", None, True, 0.5])
def test_a_wrong_level_is_refused_at_once(level: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(level))):
        Dumper(enable=False, level=level)


def test_a_bad_folder_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        Dumper("file/below/it")
    with pytest.raises(TypeError, match="7"):
        Dumper(7)  # type: ignore[arg-type]
    monkeypatch.setattr(dumptool.os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="there"):
        Dumper("there")
    assert os.listdir() == ["file"]


def test_cases() -> None:
    x = torch.arange(-6.0, 6.0, device=CARD)
    assert dump_cnnl_gencase(enable=True, level="L1")
    x.abs()
    assert dump_cnnl_gencase(level="L2")
    x.neg()
    assert dump_cnnl_gencase(True, "L3")
    x.exp()
    x.exp()
    assert dump_cnnl_gencase(enable=False)
    x.log()
    assert sorted(os.listdir("gen_case")) == ["abs", "exp", "neg"]
    header = "Tensor : Type = Float : Shape = [12] : Stride = [1] : Dumped = "
    assert lines("gen_case/abs/abs_1") == ["aten::abs", "self", f"{header}0"]
    assert lines("gen_case/neg/neg_1") == ["aten::neg", "self", f"{header}2", "-6", "5"]
    assert lines("gen_case/exp/exp_2")[3:] == [str(i) for i in range(-6, 6)]


def test_cases_of_a_wrong_level(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for level in ("L4", "l1", 1):
        with pytest.raises(ValueError, match=re.escape(repr(level))):
            dump_cnnl_gencase(level=level)  # type: ignore[arg-type]
    monkeypatch.setenv("CNNL_GEN_CASE", "1")
    assert not dump_cnnl_gencase()
    assert os.listdir() == []
    assert "CNNL_GEN_CASE" in caplog.text
