"""The vendor's way of a trained YOLOv3 to the card: quantize, infer, measure; with the flags of the vendor's script.

cnmix run recipes/yolov3/test.py --quantization true --image_number 8
cnmix run recipes/yolov3/test.py --mlu true --compute_map true
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from data import SHAPES
from detection import detect, mean_average_precision
from model import YOLOv3
from omegaconf import DictConfig, OmegaConf
from pictures import save_picture
from torch import Tensor, nn
from train import batches, build_model, load_data, newest_run, read_settings
from weights import load as load_weights

from cnmix import checkpoint

# What --quantized_mode chooses; "c" is with a scale for each output channel.
MODES = ("float16", "int8", "int16", "c_int8", "c_int16")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, kind: Callable[[str], Any], default: Any, text: str) -> None:
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default: {default})")

    add("mlu", _truth, False, "infer on the card, with the quantized model")
    add("jit", _truth, False, "trace the model and run it fused")
    add("batch_size", _count, 1, "images at a time")
    add("core_number", _count, 1, "cores that an inference takes")
    add("core_version", str, None, "card that an offline model is for, as MLU270")
    add("image_number", _count, 500, "images, a multiple of batch_size")
    add("half_input", _truth, False, "images in float16 on the card")
    add("quantized_mode", int, 1, ", ".join(f"{number} {name}" for number, name in enumerate(MODES)))
    add("quantization", _truth, False, "quantize the model on the host, and save it")
    add("input_channel_order", int, 0, "0 RGB, 1 BGR: order of the channels that the model was trained on")
    add("quantized_model_path", Path, Path("runs/yolov3"), "folder of the quantized model")
    add("compute_map", _truth, False, "print the mean average precision")
    add("run_mode", _truth, False, "print throughput and latency")
    add("save_offline_model", _truth, False, "leave yolov3.cambricon; with --mlu and --jit")
    add("model_path", Path, None, "checkpoint, .weights or .pth; the newest of runs/yolov3 where none")
    add("settings", str, None, "settings of a .weights or .pth, as shapes.yaml; a checkpoint has its own")
    add("conf_thres", float, 0.01, "least score")
    add("nms_thres", float, 0.45, "overlap from which two boxes are of one object")
    add("pictures", Path, None, "folder for pictures with the boxes")
    options = parser.parse_args(arguments)
    if options.quantized_mode not in range(len(MODES)):
        parser.error(f"--quantized_mode is one of 0 to {len(MODES) - 1}, not {options.quantized_mode}")
    if options.input_channel_order not in (0, 1):
        parser.error(f"--input_channel_order is 0 (RGB) or 1 (BGR), not {options.input_channel_order}")
    if options.image_number % options.batch_size:
        parser.error(f"--image_number {options.image_number} is no multiple of --batch_size {options.batch_size}")
    if options.save_offline_model and not (options.mlu and options.jit):
        parser.error(
            "--save_offline_model needs --mlu true --jit true: it is tracing on the card that leaves the model"
        )
    if options.quantization and (options.mlu or options.quantized_mode == 0):
        parser.error("--quantization computes on the host (--mlu false), and for a --quantized_mode of 1 to 4")
    if options.quantization and options.compute_map:
        parser.error("--compute_map is for a model that infers: leave it out with --quantization")
    return options


def _truth(text: str) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return known[text.lower()]


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number of at least 1, not {text!r}")
    return int(text)


def load_trained(options: argparse.Namespace) -> tuple[YOLOv3, DictConfig]:
    """Returns the trained float model, in evaluation mode, and its settings.

    Raises:
        FileNotFoundError: if there is no trained model.
        ValueError: if it does not fit its settings.
    """
    path = options.model_path or newest_run()
    if path.suffix == ".pt" and options.settings is None:
        saved = checkpoint.load(path)
        if "settings" not in saved:
            raise ValueError(f"{path} has no settings of recipes/yolov3/train.py: give them with --settings")
        settings = OmegaConf.create(saved["settings"])
    else:
        settings = read_settings([options.settings] if options.settings else [])
    model = build_model(settings)
    load_weights(model, path)
    settings.batch_size = options.batch_size
    settings.data.train_images = settings.data.test_images = options.image_number
    return model.eval(), settings


def quantize(model: nn.Module, options: argparse.Namespace, generate: bool) -> nn.Module:
    """Returns a quantized copy; ``generate`` for one that measures scales, else for one that takes them from a file."""
    from torch_mlu.core import mlu_quantize

    if not generate:
        return mlu_quantize.quantize_dynamic_mlu(model)
    name = MODES[options.quantized_mode]
    qconfig = {
        "iteration": options.image_number // options.batch_size,
        "use_avg": False,
        "data_scale": 1.0,
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
        "per_channel": name.startswith("c_"),
        "firstconv": True,
    }
    return mlu_quantize.quantize_dynamic_mlu(model, qconfig, dtype=name.removeprefix("c_"), gen_quant=True)


def prepare(
    model: nn.Module, options: argparse.Namespace, image_size: int
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Returns the model as the options have it run, and what makes its input of images in [0, 1]."""
    if not options.mlu:
        example = torch.rand(options.batch_size, 3, image_size, image_size)
        return (torch.jit.trace(model, example, check_trace=False) if options.jit else model), lambda images: images
    import torch_mlu.core.mlu_model as ct

    ct.set_core_number(options.core_number)
    if options.core_version is not None:
        ct.set_core_version(options.core_version)
    scale, dtype = 1.0, torch.float16 if options.half_input else torch.float32
    if options.quantized_mode == 0:
        model, dtype = model.half(), torch.float16
    else:
        model = quantize(model, options, generate=False)
        model.load_state_dict(checkpoint.read_plain(quantized_file(options)))
        scale = 255.0  # the first convolution normalizes
    model = model.to(ct.mlu_device())

    def send(images: Tensor) -> Tensor:
        return (images * scale).to(dtype).to(ct.mlu_device())

    if options.jit:
        example = send(torch.rand(options.batch_size, 3, image_size, image_size))
        if options.save_offline_model:
            ct.save_as_cambricon("yolov3")
        model = torch.jit.trace(model, example, check_trace=False)
        ct.save_as_cambricon("")
    return model, send


def quantized_file(options: argparse.Namespace) -> Path:
    """Returns where the quantized model is."""
    return options.quantized_model_path / f"yolov3_{MODES[options.quantized_mode]}.pth"


@torch.no_grad()
def run(options: argparse.Namespace) -> None:
    """Does what the options say."""
    model, settings = load_trained(options)
    size, names = settings.model.image_size, settings.data.names or SHAPES
    train_data, test_data = load_data(settings)
    # Scales are measured on training images, so that the test says what others would bring.
    loader = batches(train_data if options.quantization else test_data, settings, train=False)
    if options.quantization:
        model = quantize(model, options, generate=True).eval()
        send: Callable[[Tensor], Tensor] = lambda images: images  # noqa: E731
    else:
        model, send = prepare(model, options, size)

    found: list[Tensor] = []
    objects: list[Tensor] = []
    total_hardware = total_e2e = 0.0
    for images, targets in islice(loader, options.image_number // options.batch_size):
        if options.input_channel_order == 1:
            images = images.flip(1)
        start = time.perf_counter()
        sent = send(images)
        before = time.perf_counter()
        output = model(sent)
        total_hardware += time.perf_counter() - before
        detections = detect(output, size, options.conf_thres, options.nms_thres)
        total_e2e += time.perf_counter() - start
        if options.pictures is not None:
            for number, (image, boxes) in enumerate(zip(images, detections, strict=True), start=len(found)):
                good = boxes[boxes[:, 4] * boxes[:, 5] > 0.3]
                save_picture(options.pictures / f"{number:05}.png", image, good, names, scale=max(1, 512 // size))
        found += detections
        objects += targets
    if len(found) < options.image_number:
        print(f"there are {len(found)} images, not {options.image_number}", file=sys.stderr)
    if options.quantization:
        checkpoint.write(quantized_file(options), model.state_dict())
        print(f"quantized: {quantized_file(options)}")
    if options.compute_map:
        precision, at_half = mean_average_precision(found, objects, len(names), size)
        print("Mean AP: " + str(precision))
        print("Mean AP (overlap 0.5): " + str(at_half))
    if options.run_mode:
        print("Throughput(fps): " + str(len(found) / total_e2e))
        print("Latency(ms): " + str(options.batch_size / (len(found) / total_hardware) * 1000))


if __name__ == "__main__":
    try:
        run(parse())
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("torch_mlu"):
            raise
        sys.exit("error: there is no torch_mlu: run this with `cnmix run`, which puts the emulated card in place")
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
