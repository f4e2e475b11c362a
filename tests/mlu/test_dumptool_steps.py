import importlib
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from dumps import CARD, assert_is, dumped, files, folders, lines
from torch import Tensor, nn
from training_step import OPERATORS, batch, small_net

import cnmix
import cnmix.torch_mlu
from cnmix.torch_mlu.core.dumptool import Dumper


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


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
    assert [name for name in plain if name not in ("view", "as_strided")] == OPERATORS
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


def test_use_cpu_of_operators_that_take_a_number_for_a_tensor() -> None:
    x = torch.arange(3, device=CARD)
    here = dumped(lambda: (x % 2, x & 1, 2 ** x.float(), x * True), use_cpu=True)
    names = [name for name in folders(here) if "to_copy" not in name]
    assert [name.partition("_")[2] for name in names if (here / name / "cpu_result").exists()] == [
        *("remainder", "bitwise_and", "pow", "mul")
    ]
    assert lines(here / "1_remainder" / "mlu_other") == ["Scalar : Type = Long", "2"]
    for name in names:
        assert lines(here / name / "cpu_result") == lines(here / name / "cnnl_result")


def test_moving_a_model_is_not_written() -> None:
    assert folders(dumped(lambda: small_net().to(CARD))) == []


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
