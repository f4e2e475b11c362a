"""The vendor's documents: every block of Python runs as it is printed, given the data that it names."""

import json
import random
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from documents import blocks as blocks_of
from documents import execute
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from cnmix.torch_mlu.fusion_groups import FusionGroup
from cnmix.torch_mlu.settings import settings

DOCUMENTS = Path(__file__).parent / "documents"


def blocks(document: str) -> dict[str, str]:
    """Returns a document's blocks by what they are about."""
    return {block.heading: block.source for block in blocks_of((DOCUMENTS / f"{document}.md").read_text())}


def run(
    document: str, names: list[str], given: dict[str, Any], corrections: dict[str, dict[str, str]] | None = None
) -> None:
    """Runs blocks in one namespace, which starts with what the document takes as given.

    Args:
        document: whose blocks.
        names: of the blocks, in order.
        given: the namespace.
        corrections: of the blocks that are no Python as they are printed: what replaces what.
    """
    of_document = blocks(document)
    for name in names:
        source = of_document[name]
        for wrong, right in (corrections or {}).get(name, {}).items():
            try:
                compile(source, name, "exec")
            except SyntaxError:
                assert wrong in source
                source = source.replace(wrong, right)
            else:
                raise AssertionError(f"{document}, {name!r} runs as it is printed")
        execute(source, f"{document}: {name}", given)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Documents save files where they stand, and switch gradients off."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    random.seed(0)
    with torch.enable_grad(), warnings.catch_warnings():
        # The documents' network has a Dropout2d behind a linear layer, which newer PyTorch deprecates.
        warnings.filterwarnings("ignore", message="dropout2d: Received a 2-D input")
        warnings.filterwarnings("ignore", message="`torch.jit.trace(_method)?` is deprecated")
        # Of the documents' settings one is misspelt, and one is without effect.
        warnings.filterwarnings("ignore", message="qconfig_spec: ")
        yield


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What the documents import of torchvision: handwritten digits in the place of MNIST, two small networks."""

    class Mnist(torch.utils.data.Dataset[Any]):
        def __init__(self, root: str, train: bool, transform: Any = None, download: bool = False) -> None:
            digits = load_digits()
            images = F.interpolate(torch.as_tensor(digits.images)[:, None] * 16, size=28, mode="bilinear")
            images, classes = images.clamp(0, 255).to(torch.uint8), torch.as_tensor(digits.target)
            part = slice(0, 640) if train else slice(1280, None)
            self.images, self.classes, self.transform = images[part], classes[part], transform

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            image = self.images[index]
            return image if self.transform is None else self.transform(image), int(self.classes[index])

    class Compose:
        def __init__(self, steps: list[Any]) -> None:
            self.steps = steps

        def __call__(self, x: Any) -> Any:
            for step in self.steps:
                x = step(x)
            return x

    class Normalize:
        def __init__(self, mean: list[float], std: list[float]) -> None:
            self.mean, self.std = (torch.tensor(each)[:, None, None] for each in (mean, std))

        def __call__(self, x: Tensor) -> Tensor:
            return (x - self.mean) / self.std

    made = ModuleType("torchvision")
    names = ("datasets", "datasets.mnist", "transforms", "models", "models.quantization", "models.object_detection")
    modules: dict[str, Any] = {name: ModuleType(f"torchvision.{name}") for name in names}
    for name, module in {"": made, **modules}.items():
        monkeypatch.setitem(sys.modules, f"torchvision.{name}".rstrip("."), module)
        if name:
            parent, _, child = name.rpartition(".")
            setattr(modules[parent] if parent else made, child, module)
    modules["datasets.mnist"].MNIST = Mnist
    modules["transforms"].Compose, modules["transforms"].Normalize = Compose, Normalize
    modules["transforms"].ToTensor = lambda: lambda image: image.float() / 255
    modules["models.quantization"].net_name = lambda pretrained, quantize: small_network()
    modules["models.object_detection"].yolov3 = lambda *_, **__: small_network()
    modules["models.quantization"].object_detection = modules["models.object_detection"]
    return made


def small_network() -> nn.Module:
    torch.manual_seed(1)
    convolutions = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10)).eval()


def fused_groups(module: Any) -> list[str]:
    """The names of the groups of the last program that a traced module has made."""
    program, _ = list(module.forward._made.values())[-1]
    return [part.name for part in program.parts if isinstance(part, FusionGroup)]


class TestBasics:
    def test_settings_and_pretrained_models(self, torchvision: ModuleType) -> None:
        given: dict[str, Any] = {"torch": torch, "args": SimpleNamespace(core_number=4, mcore="MLU270", input_format=0)}
        run("basics", ["imports", "inference settings", "pretrained model"], given)
        assert isinstance(given["net"], nn.Module)
        assert (settings().core_number, settings().core_version) == (4, "MLU270")
        torch.set_grad_enabled(True)

    def test_inference(self, capsys: pytest.CaptureFixture[str]) -> None:
        given: dict[str, Any] = {}
        run("basics", ["inference: imports", "inference: layers", "inference: network"], given)
        given |= {"net": given["Net"]().eval(), "input_data": torch.randn(1, 1, 28, 28)}
        run("basics", ["inference: save"], given)
        with pytest.warns(UserWarning, match="was not observed"):  # the document saves without running the model
            run("basics", ["inference: quantize"], given)
        run("basics", ["inference: infer"], given)
        assert given["output"].is_mlu
        printed = capsys.readouterr().out.rpartition("tensor(")[2]
        assert "mlu" not in printed  # it came from .cpu()
        saved = torch.load("test_quantization.pth")
        assert saved["conv1.input_std"].item() == pytest.approx(1)
        assert saved["conv1.quantized_mode"].tolist() == [1]

    def test_training(self, torchvision: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
        given: dict[str, Any] = {}
        run("basics", ["training: imports", "training: layers", "training: forward"], given)
        given["Net"].forward = given["forward"]
        run("basics", ["training: data", "training: quantize", "training: functions"], given)
        assert next(given["net"].parameters()).is_mlu
        given["nums_epoch"] = 2
        for epoch in range(given["nums_epoch"]):
            given["train"](given["net"], given["train_data"], given["optimizer"], epoch)
            given["validate"](given["test_data"], given["net"])
            given["epoch"] = epoch
            run("basics", ["training: save"], given)
        printed = capsys.readouterr().out
        assert "Train Epoch: 1 [0/640 (0%)]\tLoss: " in printed
        right = int(printed.rpartition("Accuracy: ")[2].partition("/")[0])
        assert right > 0.3 * len(given["test_set"])
        saved = torch.load("model.pth")
        assert saved["epoch"] == 1
        assert all(value.is_mlu for value in saved["state_dict"].values())
        plain = given["Net"]()
        plain.load_state_dict(torch.load("model.pth", map_location="cpu")["state_dict"])
        run("basics", ["training: data at hand"], given)
        assert len(given["train_set"]) == 640


class TestFusedInference:
    def test_the_switch(self) -> None:
        run("fused_inference", ["switch"], {})
        assert not settings().fuses

    def test_single_operators(self) -> None:
        given: dict[str, Any] = {}
        run("fused_inference", ["convolution"], given)
        assert given["out_mlu"].is_mlu
        weight, bias = given["n"].conv.weight.cpu(), given["n"].conv.bias.cpu()
        assert torch.allclose(given["out_cpu"], F.conv2d(given["input"], weight, bias), atol=1e-6)
        assert fused_groups(given["module"]) == ["MLUFusionGroup_0"]  # of other shapes than the example
        run("fused_inference", ["relu"], given)
        assert fused_groups(given["module"]) == ["MLUFusionGroup_0"]
        assert torch.equal(given["out_cpu"], given["input"].relu())

    @pytest.mark.parametrize(
        ("name", "dtype", "tolerance"),
        [
            ("float32", torch.float32, 0.0),
            ("float16", torch.float16, 1e-5),
            ("int8", torch.float32, 2e-4),
            ("int16", torch.float16, 1e-5),
        ],
    )
    def test_networks(self, name: str, dtype: torch.dtype, tolerance: float) -> None:
        given: dict[str, Any] = {}
        run("fused_inference", ["model"], given)
        expected = given["model"](given["input1"])
        run("fused_inference", [name], given)
        assert given["output"].is_mlu
        assert given["output"].dtype == dtype
        assert F.mse_loss(given["output"].cpu().float(), expected).item() <= tolerance
        assert fused_groups(given["traced_model"]) == ["MLUFusionGroup_0"]
        given["ct"]._jit_override_can_fuse_on_mlu(False)
        x = given["input1"].to(dtype).to("mlu")
        assert torch.equal(given["traced_model"](x), given["output"])


class TestTools:
    def test_a_network_is_quantized_and_runs(self) -> None:
        import torch_mlu
        import torch_mlu.core.mlu_model as ct

        torch.save(small_network().state_dict(), "path_origin_resnet50.pth")
        given: dict[str, Any] = {"torch": torch, "torch_mlu": torch_mlu, "ct": ct, "resnet50": small_network}
        given["img"] = given["input_tensor"] = given["example_input"] = torch.rand(2, 3, 16, 16)
        names = [name for name in blocks("tools") if name.startswith("generate: ")]
        run("tools", names, given)
        names = ["run: network", "run: quantize", "run: weights", "run: card"]
        run("tools", names, given)
        of_document = blocks("tools")["run: traced"]
        # The last line lacks a parenthesis in the document.
        assert of_document.endswith("traced_model_mlu(img.to(ct.mlu_device())\n")
        with pytest.raises(SyntaxError):
            compile(of_document, "traced", "exec")
        exec(compile(of_document.rstrip("\n") + ")\n", "traced", "exec"), given)
        image = given["img"].mlu()
        assert torch.equal(given["traced_model_mlu"](image), given["quantized_model_mlu"](image))
        expected = small_network()(given["img"])
        assert F.mse_loss(given["quantized_model_mlu"](image).cpu(), expected).item() < 0.02

    def test_the_signature(self) -> None:
        import torch_mlu

        given: dict[str, Any] = {"torch_mlu": torch_mlu, "model": small_network()}
        run("tools", ["signature"], given)
        assert type(given["quantized_model"][0]).__name__ == "MLUConv2d"

    def test_a_subclass_is_defined(self) -> None:
        run("tools", ["subclass"], {"torch": torch})

    def test_training_steps_are_dumped(self) -> None:
        import torch_mlu

        run("tools", ["dumper"], {"torch_mlu": torch_mlu})
        assert not Path("dump").exists()
        model = small_network().mlu()
        batch = torch.rand(2, 3, 8, 8).mlu(), torch.tensor([1, 2]).mlu()
        # The document's loop calls its targets by two names.
        run(
            "tools",
            ["dump"],
            {"train_loader": [batch] * 5, "model": model, "criterion": F.cross_entropy, "targe": batch[1]},
        )
        assert sorted(path.name for path in Path().iterdir()) == [f"dump_iter_{i}" for i in range(4)]
        first = Path("dump_iter_0") / "1_convolution_overrideable"
        assert {path.name for path in first.iterdir()} >= {
            "cnnl_result",
            "cpu_result",
            "mlu_bias",
            "mlu_input",
            "mlu_weight",
        }
        header = (first / "mlu_weight").read_text().splitlines()[0]
        assert header == "Tensor : Type = Float : Shape = [8, 3, 3, 3] : Stride = [27, 9, 3, 1] : Dumped = 216"
        assert any("convolution_backward" in path.name for path in Path("dump_iter_3").iterdir())

    def test_fusion_is_switched(self) -> None:
        source = blocks("tools")["fusion"]
        with pytest.raises(SyntaxError, match="U\\+3000"):  # the document indents with ideographic spaces
            compile(source, "fusion", "exec")
        try:
            exec(compile(re.sub(r"^[^\S\n]+(?=\.)", "    ", source, flags=re.MULTILINE), "fusion", "exec"), {})
            assert not torch.backends.mlufusion.enabled  # type: ignore[attr-defined]
        finally:
            torch.backends.mlufusion.set_flags(True)  # type: ignore[attr-defined]


def test_catch_perf(capsys: pytest.CaptureFixture[str]) -> None:
    # The document imports the profiler in its last line, behind its use.
    from catch_perf import profiler

    run("overview", ["catchPerf"], {"profiler": profiler})
    printed = capsys.readouterr().out
    assert "add" in printed
    assert "abs" in printed
    assert json.loads(Path("test.json").read_text())


class TestYolo:
    def test_quantizing_and_inferring(self, torchvision: ModuleType) -> None:
        import torch_mlu
        import torch_mlu.core.mlu_quantize as mlu_quantize
        from torch.autograd import Variable

        model = small_network()
        opt = SimpleNamespace(
            quantized_model_path=".", half_input=1, mlu=True, batch_size=1, run_mode=True, image_number=8
        )
        given: dict[str, Any] = {
            "models": torchvision.models,
            "mlu_quantize": mlu_quantize,
            "torch_mlu": torch_mlu,
            "torch": torch,
            "Tensor": torch.FloatTensor,
            "Variable": Variable,
            "opt": opt,
            "model": model,
            "weight_path": "yolov3.pth",
            "quantized_weight_path": "yolov3_int8.pth",
            "img_size": 16,
            "conf_thres": 0.1,
            "nms_thres": 0.5,
            "dtype": "int8",
            "per_channel": True,
            "imgs": torch.rand(1, 3, 16, 16),
        }
        # In the document a positional argument follows a keyword, and dots stand for what it leaves out.
        arguments = {"pretrained=True, img_size": "img_size", "......": "model_ran = quantized_model(imgs)"}
        run("yolov3", ["quantize"], given, {"quantize": arguments})
        given["model"] = mlu_quantize.quantize_dynamic_mlu(small_network())
        given["model"].load_state_dict(torch.load("yolov3_int8.pth"))
        loaded = given["model"]
        torchvision.models.quantization.object_detection.yolov3 = lambda *_: loaded
        run("yolov3", ["model"], given, {"model": {"pretrained=True,quantize=True,": ""}})
        assert next(given["model"].parameters()).is_mlu
        given["model"].half()
        run("yolov3", ["input"], given, {"input": {"......": ""}})
        assert given["outputs"].dtype == torch.float16
        run("yolov3", ["trace"], given)
        assert torch.equal(given["model"](given["imgs"]), given["outputs"])

    def test_reports_and_offline_models(self, capsys: pytest.CaptureFixture[str]) -> None:
        import torch_mlu

        opt = SimpleNamespace(run_mode=True, image_number=496, batch_size=16)
        run("yolov3", ["report"], {"opt": opt, "total_e2e": 31.0, "total_hardware": 15.5})
        assert capsys.readouterr().out == "Throughput(fps): 16.0\nLatency(ms): 500.0\n"
        run("yolov3", ["offline"], {"torch_mlu": torch_mlu})
        torch.jit.trace(small_network(), torch.rand(1, 3, 16, 16))
        assert Path("yolov3.cambricon").exists()
