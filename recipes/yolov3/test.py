"""The vendor's way of a trained YOLOv3 to the card: quantize, infer, measure; with the flags of the vendor's script.

cnmix run recipes/yolov3/test.py --quantization true --image_number 8
cnmix run recipes/yolov3/test.py --mlu true --compute_map true
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from data import SHAPES
from detection import detect, mean_average_precision
from omegaconf import DictConfig, OmegaConf
from pictures import save_picture
from settings import batches, load_data, read_settings
from torch import Tensor

from cnmix import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vendor_flow

# The first convolution takes images in [0, 255], and divides them by 255.
FIRST = {"firstconv": True, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
# The maps are coordinates, in int16 as shapes.yaml trains them: in int8 boxes lose five points of precision.
MIXED = {"head32.map,head16.map,head8.map": "int16"}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    flags = vendor_flow.Flags(__doc__, "runs/yolov3", images=500)
    flags.flag("compute_map", vendor_flow.truth, False, "print the mean average precision")
    flags.flag("settings", str, None, "settings of a .weights, .pth or offline model; a checkpoint has its own")
    flags.flag("conf_thres", float, 0.01, "least score")
    flags.flag("nms_thres", float, 0.45, "overlap from which two boxes are of one object")
    flags.flag("pictures", Path, None, "folder for pictures with the boxes")
    options = flags.read(arguments)
    if options.quantization and options.compute_map:
        flags.error("--compute_map is for a model that infers: leave it out with --quantization")
    return options


def load_trained(options: argparse.Namespace) -> tuple[vendor_flow.Runner, DictConfig]:
    """Returns the model as the options have it run, and its settings.

    Raises:
        FileNotFoundError: if there is no trained model.
        ValueError: if it does not fit its settings.
    """
    # Here, since an offline model needs none of it.
    from train import build_model, newest_run
    from weights import load as load_weights

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
    size = settings.model.image_size
    return vendor_flow.online(options, "yolov3", model.eval(), (3, size, size), FIRST, MIXED), settings


def load_offline(options: argparse.Namespace) -> tuple[vendor_flow.Runner, DictConfig]:
    """Returns the offline model, and the settings of its images."""
    settings = read_settings([options.settings] if options.settings else [])
    runner = vendor_flow.offline(options, FIRST)
    settings.model.image_size = runner.model.inputs[0].shape[2]
    return runner, settings


@torch.no_grad()
def run(options: argparse.Namespace) -> list[Tensor]:
    """Does what the options say; returns what was found in each image."""
    runner, settings = load_trained(options) if options.offline is None else load_offline(options)
    settings.batch_size = options.batch_size
    settings.data.train_images = settings.data.test_images = options.image_number
    size, names = settings.model.image_size, settings.data.names or SHAPES
    train_data, test_data = load_data(settings)
    # Scales are measured on training images, so that the test says what others would bring.
    loader = batches(train_data if options.quantization else test_data, settings, train=False)
    found: list[Tensor] = []
    objects: list[Tensor] = []
    for images, targets in islice(loader, options.image_number // options.batch_size):
        detections = runner.run(images, lambda output: detect(output, size, options.conf_thres, options.nms_thres))
        if options.pictures is not None:
            for number, (image, boxes) in enumerate(zip(images, detections, strict=True), start=len(found)):
                good = boxes[boxes[:, 4] * boxes[:, 5] > 0.3]
                save_picture(options.pictures / f"{number:05}.png", image, good, names, scale=max(1, 512 // size))
        found += detections
        objects += targets
    if options.quantization:
        vendor_flow.save_quantized(options, "yolov3", runner)
    if options.compute_map:
        precision, at_half = mean_average_precision(found, objects, len(names), size)
        print("Mean AP: " + str(precision))
        print("Mean AP (overlap 0.5): " + str(at_half))
    runner.end()
    return found


if __name__ == "__main__":
    vendor_flow.main(lambda: run(parse()))
