import importlib
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dumps import CARD, dumped, files, folders, lines
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cnmix.torch_mlu.core import dumptool
from cnmix.torch_mlu.core.dumptool import Dumper, dump_cnnl_gencase


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CNNL_GEN_CASE", raising=False)


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


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (5, 4), (3, 2, 2), (4, 1, 3), (1, 30), (2, 1, 40)])
def test_the_first_values_are_the_first_of_any_layout(shape: tuple[int, ...]) -> None:
    x = torch.arange(math.prod(shape), device=CARD).reshape(shape)
    turned = x.permute(tuple(reversed(range(x.dim()))))
    for each in (x, turned):
        assert one_tensor(each, 0)[1:] == [str(i) for i in each.flatten().tolist()[:10]]


def test_the_first_values_of_a_large_tensor_are_not_read_from_a_copy() -> None:
    x = torch.ones(1, 1, device=CARD).expand(2**20, 2**20)  # 4 TiB, if it was a copy
    here = dumped(lambda: x.view(2**40)) / "1_view"
    for name in ("mlu_self", "cnnl_result"):
        assert lines(here / name)[1:] == ["1"] * 10


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


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_writes_nothing() -> None:
    x = torch.ones(2, device=CARD)
    with Dumper("forked"):
        child = os.fork()
        if child == 0:
            try:
                x.abs()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        x.neg()
    assert folders("forked") == ["1_neg"]


def test_the_vendors_name_is_the_same_module() -> None:
    assert importlib.import_module("torch_mlu.core.dumptool") is dumptool
