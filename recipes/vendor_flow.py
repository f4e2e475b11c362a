"""The vendor's way of a trained model to the card, for scripts with the vendor's flags.

Quantize, infer operator by operator or fused, leave an offline model, infer from that file alone, measure.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cnmix import checkpoint
from cnmix.inference import OfflineModel

# What --quantized_mode chooses; "c" is with a scale for each output channel.
MODES = ("float16", "int8", "int16", "c_int8", "c_int16")

T = TypeVar("T")


class Flags(argparse.ArgumentParser):
    """The flags that all of these scripts have.

    Args:
        description: of the script.
        folder: where runs and quantized models are, by default.
        images: how many to run on, by default.
    """

    def __init__(self, description: str | None, folder: str, images: int) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.flag("mlu", truth, False, "infer on the card, with the quantized model")
        self.flag("jit", truth, False, "trace the model and run it fused")
        self.flag("batch_size", count, 1, "images at a time")
        self.flag("core_number", count, 1, "cores that an inference takes")
        self.flag("core_version", str, None, "card that an offline model is for, as MLU270")
        self.flag("image_number", count, images, "images, a multiple of batch_size")
        self.flag("half_input", truth, False, "images in float16 on the card")
        self.flag("quantized_mode", int, 1, ", ".join(f"{number} {name}" for number, name in enumerate(MODES)))
        self.flag("quantization", truth, False, "quantize the model on the host, and save it")
        self.flag("input_channel_order", int, 0, "0 RGB, 1 BGR: order of the channels that the model was trained on")
        self.flag("quantized_model_path", Path, Path(folder), "folder of the quantized model")
        self.flag("run_mode", truth, False, "print throughput and latency, without what the first images take longer")
        self.flag("save_offline_model", truth, False, "leave an offline model in this folder; with --mlu and --jit")
        self.flag("offline", Path, None, "offline model to run, and nothing else; needs no card and no model_path")
        self.flag("model_path", Path, None, f"trained model; the newest of {folder} where none")

    def flag(self, name: str, kind: Callable[[str], Any], default: Any, text: str) -> None:
        """Adds a flag, with the default in its help."""
        self.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default: {default})")

    def read(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Reads a command line, the process's own where None, and refuses what does not go together."""
        options = self.parse_args(arguments)
        if options.quantized_mode not in range(len(MODES)):
            self.error(f"--quantized_mode is one of 0 to {len(MODES) - 1}, not {options.quantized_mode}")
        if options.input_channel_order not in (0, 1):
            self.error(f"--input_channel_order is 0 (RGB) or 1 (BGR), not {options.input_channel_order}")
        if options.image_number % options.batch_size:
            self.error(f"--image_number {options.image_number} is no multiple of --batch_size {options.batch_size}")
        if options.offline is not None and (options.mlu or options.jit or options.quantization):
            self.error("--offline runs a file, with no model: leave out --mlu, --jit and --quantization")
        if options.save_offline_model and not (options.mlu and options.jit):
            self.error(
                "--save_offline_model needs --mlu true --jit true: it is tracing on the card that leaves the model"
            )
        if options.quantization and (options.mlu or options.quantized_mode == 0):
            self.error("--quantization computes on the host (--mlu false), and for a --quantized_mode of 1 to 4")
        return options


def truth(text: str) -> bool:
    """Reads a flag that is true or false."""
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return known[text.lower()]


def count(text: str) -> int:
    """Reads a number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number of at least 1, not {text!r}")
    return int(text)


class Runner:
    """A model that is ready, and the times that it takes.

    Args:
        options: of the command line.
        model: to run.
        send: makes its input of images as the float model takes them, (N, 3, H, W).
    """

    def __init__(self, options: argparse.Namespace, model: Callable[[Tensor], Any], send: Callable[[Tensor], Tensor]):
        self.options, self.model, self.send = options, model, send
        self.images, self.hardware_seconds, self.seconds = 0, 0.0, 0.0

    def run(self, images: Tensor, finish: Callable[[Any], T]) -> T:
        """Returns what ``finish`` makes of the model's answer to images."""
        if self.options.input_channel_order == 1:
            images = images.flip(1)
        if self.options.run_mode and not self.images:  # the first call makes what the others find made
            finish(self.model(self.send(images)))
        start = time.perf_counter()
        sent = self.send(images)
        before = time.perf_counter()
        output = self.model(sent)
        self.hardware_seconds += time.perf_counter() - before
        finished = finish(output)
        self.seconds += time.perf_counter() - start
        self.images += len(images)
        return finished

    def end(self) -> None:
        """Says what else there is to say: fewer images than wished, and the times."""
        if self.images < self.options.image_number:
            print(f"there are {self.images} images, not {self.options.image_number}", file=sys.stderr)
        if self.options.run_mode and self.images:
            print("Throughput(fps): " + str(self.images / self.seconds))
            print("Latency(ms): " + str(self.options.batch_size / (self.images / self.hardware_seconds) * 1000))


def offline(options: argparse.Namespace, first: Mapping[str, Any]) -> Runner:
    """Returns the offline model, ready to run on the host.

    Args:
        options: of the command line.
        first: as of ``online``.

    Raises:
        ValueError: if the file is no offline model, or not one of images, or is for another number of them.
        OSError: if it cannot be read.
    """
    model = OfflineModel(options.offline)
    shapes = [tuple(each.shape) for each in model.inputs]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] != 3 or not model.inputs[0].dtype.is_floating_point:
        raise ValueError(f"{options.offline} is no model of images: it takes {shapes}")
    if model.batch_size != options.batch_size:
        raise ValueError(f"{options.offline} takes --batch_size {model.batch_size}, not {options.batch_size}")
    return Runner(options, model, _sender(options, first, model.inputs[0].dtype, torch.device("cpu")))


def online(
    options: argparse.Namespace,
    name: str,
    model: nn.Module,
    shape: Sequence[int],
    first: Mapping[str, Any],
    mixed: Mapping[str, str] | None = None,
) -> Runner:
    """Returns a model as the options have it run: measuring scales, on the host, or on the card.

    Args:
        options: of the command line.
        name: of the model, and so of its files.
        model: with its trained weights, in evaluation mode.
        shape: of an image as it takes one, (3, H, W).
        first: what the first convolution is told about images by ``qconfig``: ``firstconv``, ``mean``, ``std``. With
            ``firstconv`` a quantized model takes images in [0, 255].
        mixed: ``mixed_layer`` of ``quantize_dynamic_mlu``: layers that are measured for another width.

    Raises:
        FileNotFoundError: if there is no quantized model yet.
    """
    example = torch.rand(options.batch_size, *shape)
    if options.quantization:
        return Runner(options, _measuring(model, options, first, mixed), lambda images: images)
    if not options.mlu:
        traced = torch.jit.trace(model, example, check_trace=False) if options.jit else model
        return Runner(options, traced, lambda images: images)
    import torch_mlu.core.mlu_model as ct
    from torch_mlu.core import mlu_quantize

    ct.set_core_number(options.core_number)
    if options.core_version is not None:
        ct.set_core_version(options.core_version)
    if options.quantized_mode == 0:
        model = model.half()
    else:
        file = quantized_file(options, name)
        if not file.is_file():
            raise FileNotFoundError(f"there is no quantized model {file}: make it with --quantization true")
        model = mlu_quantize.quantize_dynamic_mlu(model)
        model.load_state_dict(checkpoint.read_plain(file))
    model = model.to(ct.mlu_device())
    half = options.half_input or options.quantized_mode == 0
    send = _sender(options, first, torch.float16 if half else torch.float32, ct.mlu_device())
    if options.jit:
        if options.save_offline_model:
            ct.save_as_cambricon(name)
        model = torch.jit.trace(model, send(example), check_trace=False)
        if options.save_offline_model:
            ct.save_as_cambricon("")
            print(f"offline model: {name}.cambricon")
    return Runner(options, model, send)


def quantized_file(options: argparse.Namespace, name: str) -> Path:
    """Returns where the quantized model is."""
    return options.quantized_model_path / f"{name}_{MODES[options.quantized_mode]}.pth"


def save_quantized(options: argparse.Namespace, name: str, runner: Runner) -> None:
    """Saves the model that has measured its scales."""
    file = quantized_file(options, name)
    checkpoint.write(file, runner.model.state_dict())
    print(f"quantized: {file}")


def main(run: Callable[[], Any]) -> None:
    """Runs a script; what a user can mend is one line and no traceback."""
    try:
        with torch.no_grad():
            run()
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("torch_mlu"):
            raise
        sys.exit("error: there is no torch_mlu: run this with `cnmix run`, which puts the emulated card in place")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def _measuring(
    model: nn.Module, options: argparse.Namespace, first: Mapping[str, Any], mixed: Mapping[str, str] | None
) -> nn.Module:
    """Returns a quantized copy, which measures its scales."""
    from torch_mlu.core import mlu_quantize

    name = MODES[options.quantized_mode]
    qconfig = {
        "iteration": options.image_number // options.batch_size,
        "use_avg": False,
        "data_scale": 1.0,
        "per_channel": name.startswith("c_"),
        **first,
    }
    dtype = name.removeprefix("c_")
    return mlu_quantize.quantize_dynamic_mlu(model, qconfig, dtype=dtype, gen_quant=True, mixed_layer=mixed)


def _sender(
    options: argparse.Namespace, first: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor], Tensor]:
    scale = 255.0 if first["firstconv"] and options.quantized_mode != 0 else 1.0
    return lambda images: (images if scale == 1 else images * scale).to(dtype).to(device)
