"""The arms of the inference benchmark: torch, onnxruntime and cnmix, each from one checkpoint."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnmix import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))
import imagenet
import imagenet_checkpoint

Run = Callable[[Tensor], Tensor]

BATCHES_OF_TRAINING = {"resnet50": 4, "vgg19": 2}
CALIBRATION = 32  # images that peers calibrate on: some of those that the network was settled on


@dataclass(frozen=True)
class Case:
    """A network at a batch size, and the folder where its files are.

    Attributes:
        network: ``resnet50`` or ``vgg19``.
        batch: images in a call.
        folder: of the files.
        threads: of torch and of onnxruntime.
    """

    network: str
    batch: int
    folder: Path
    threads: int

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that all arms come from."""
        return self.folder / f"{self.network}.ckpt"

    def file(self, suffix: str) -> Path:
        """Returns a file of the network; one for each batch size where the suffix has ``{batch}``."""
        return self.folder / (self.network + suffix.format(batch=f".{self.batch}"))

    def plain(self) -> nn.Module:
        """Returns the network without weights of worth."""
        return getattr(imagenet, self.network)().eval()

    def model(self) -> nn.Module:
        """Returns the float32 network of the checkpoint."""
        model = self.plain()
        model.load_state_dict(checkpoint.load(self.checkpoint)["state_dict"])
        return model

    def calibration(self, size: int) -> Iterator[Tensor]:
        """Yields the images that peers calibrate on, ``size`` at a time."""
        yield from imagenet.images(CALIBRATION)[0].split(size)

    def make_checkpoint(self) -> None:
        """Makes the checkpoint where there is none."""
        if not self.checkpoint.exists():
            torch.manual_seed(0)
            imagenet_checkpoint.make_checkpoint(
                self.checkpoint, self.plain(), batch_size=BATCHES_OF_TRAINING[self.network]
            )


@dataclass(frozen=True)
class Arm:
    """One way of running a network.

    Attributes:
        title: what tables call it.
        load: returns what is timed.
        make: writes the file.
        suffix: of the file, whose size the table has.
        packages: what ``load`` imports; its memory is not counted.
    """

    title: str
    load: Callable[[Case], Run]
    make: Callable[[Case], None] = lambda case: None
    suffix: str = ""
    packages: tuple[str, ...] = ()

    def import_packages(self) -> None:
        """Imports what ``load`` will."""
        for package in self.packages:
            importlib.import_module(package)


def save_float(case: Case) -> None:
    """Writes the weights as ``torch.save`` does."""
    torch.save(case.model().state_dict(), case.file(".pth"))


def channels_last(case: Case) -> Run:
    """Runs the float32 network on images and weights with the channels last."""
    model = case.model().to(memory_format=torch.channels_last)
    return lambda x: model(x.contiguous(memory_format=torch.channels_last))


def bfloat16(case: Case) -> Run:
    """Runs it under autocast, channels last."""
    run = channels_last(case)

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run(x).float()

    return autocast


def compiled(model: nn.Module) -> Run:
    """Compiles for inference: the weights are constants, which Inductor packs for its kernels."""
    torch._inductor.config.freezing = True
    return torch.compile(model)


def torch_int8(case: Case) -> Run:
    """Quantizes statically as torch documents it for x86 (PT2E), in int8 by channel, and compiles."""
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    # Its patterns need the names that only strict export records.
    exported = torch.export.export(case.model(), (next(case.calibration(case.batch)),), strict=True).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    observed = quantize_pt2e.prepare_pt2e(exported, quantizer)
    for x in case.calibration(case.batch):
        observed(x)
    return compiled(quantize_pt2e.convert_pt2e(observed))


def export_float(case: Case) -> None:
    """Writes the float32 network as ONNX, for any batch size."""
    path = case.file(".onnx")
    if not path.exists():
        torch.onnx.export(
            case.model(),
            (next(case.calibration(2)),),
            path,
            dynamo=True,
            external_data=False,
            input_names=["x"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )


def quantize_onnx(case: Case) -> None:
    """Quantizes the exported network as onnxruntime documents it: preprocessed, static, QDQ, weights by channel.

    Activations are uint8: with int8 ones onnxruntime 1.31 leaves convolutions in float on x86: thrice as slow.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = case.calibration(8)

        def get_next(self) -> dict[str, Any] | None:
            x = next(self.batches, None)
            return None if x is None else {"x": x.numpy()}

    path = case.file(".int8.onnx")
    if path.exists():
        return
    export_float(case)
    prepared = case.file(".prepared.onnx")
    quant_pre_process(str(case.file(".onnx")), str(prepared))
    quantization.quantize_static(
        str(prepared),
        str(path),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        calibrate_method=quantization.CalibrationMethod.MinMax,
    )
    prepared.unlink()


def onnx_session(case: Case, suffix: str) -> Run:
    """Runs a file in onnxruntime, all optimizations on, its batch size known to them."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = case.threads, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_free_dimension_override_by_name("batch", case.batch)
    session = onnxruntime.InferenceSession(str(case.file(suffix)), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def cnmix_eager(case: Case) -> nn.Module:
    """Loads the checkpoint as an integer model."""
    from cnmix import inference

    return inference.load(case.plain(), case.checkpoint)


def cnmix_fused(case: Case) -> Any:
    """Fuses the integer model."""
    from cnmix import inference

    return inference.fuse(cnmix_eager(case), next(case.calibration(case.batch)))


def save_offline(case: Case) -> None:
    """Writes the fused model as an offline one, anew on every run: it is what is measured."""
    cnmix_fused(case).save(case.file("{batch}.cambricon"))


def cnmix_offline(case: Case) -> Run:
    """Loads the offline model."""
    from cnmix import inference

    return inference.OfflineModel(case.file("{batch}.cambricon"))


def export_cnmix(case: Case) -> None:
    """Writes the fused model as ONNX, anew on every run."""
    from cnmix import inference

    inference.to_onnx(cnmix_fused(case), case.file("{batch}.cnmix.onnx"))


INFERENCE = ("cnmix.inference",)
ORT = ("onnxruntime",)

ARMS: dict[str, Arm] = {
    "float32": Arm("eager float32", Case.model, save_float, ".pth"),
    "float32_last": Arm("float32, channels last", channels_last, save_float, ".pth"),
    "float32_compiled": Arm("float32, torch.compile", lambda case: compiled(case.model()), save_float, ".pth"),
    "bfloat16": Arm("bfloat16 autocast, channels last", bfloat16, save_float, ".pth"),
    "torch_int8": Arm("torch int8 (PT2E, Inductor)", torch_int8, packages=("torchao.quantization.pt2e",)),
    "ort_float32": Arm(
        "onnxruntime float32", lambda case: onnx_session(case, ".onnx"), export_float, ".onnx", packages=ORT
    ),
    "ort_int8": Arm(
        "onnxruntime int8", lambda case: onnx_session(case, ".int8.onnx"), quantize_onnx, ".int8.onnx", packages=ORT
    ),
    "cnmix_eager": Arm("cnmix eager integer", cnmix_eager, suffix=".ckpt", packages=INFERENCE),
    "cnmix_fused": Arm("cnmix fused", cnmix_fused, suffix=".ckpt", packages=INFERENCE),
    "cnmix_offline": Arm("cnmix offline", cnmix_offline, save_offline, "{batch}.cambricon", INFERENCE),
    "cnmix_onnx": Arm(
        "cnmix exported to onnxruntime",
        lambda case: onnx_session(case, "{batch}.cnmix.onnx"),
        export_cnmix,
        "{batch}.cnmix.onnx",
        ORT,
    ),
}
