"""One checkpoint in float and in integers: what each finds, and how long it takes.

    cnmix run recipes/yolov3/compare.py [--images 500] [runs/yolov3/<time>/yolov3.pt]

Rows: the weights in float32; the checkpoint's integers operator by operator, fused, and from a file without the model's
code, which must agree bit for bit; and int8 with scales measured on 8 training images after training, on the emulated
card, as the vendor's way has it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from data import SHAPES, collate
from detection import detect, mean_average_precision
from omegaconf import OmegaConf
from settings import batches, load_data
from torch import Tensor, nn
from train import build_model, newest_run

from cnmix import checkpoint, inference

CALIBRATION = 8  # images


@torch.no_grad()
def main(path: Path, images: int, batch_size: int) -> None:
    """Prints the table."""
    saved = checkpoint.load(path)
    settings = OmegaConf.create(saved["settings"])
    settings.batch_size, settings.data.test_images = batch_size, images
    train_data, test_data = load_data(settings)
    loader = list(batches(test_data, settings, train=False))
    example = loader[0][0]
    plain = build_model(settings)
    plain.load_state_dict(saved["state_dict"])
    integers = inference.load(build_model(settings), saved)
    fused = inference.fuse(integers, example)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "yolov3.cambricon")
        fused.save(file)
        offline = inference.OfflineModel(file)  # maps the file, which it keeps when it has no name any more
    calibration, _ = collate([train_data[index] for index in range(CALIBRATION)])
    rows: dict[str, Callable[[Tensor], Tensor]] = {
        "float32": plain.eval(),
        "integers": integers,
        "integers, fused": fused,
        "integers, offline": offline,
        "int8, calibrated": _calibrated(plain, build_model(settings), calibration),
    }
    names = settings.data.names or SHAPES
    size = settings.model.image_size
    outputs: dict[str, list[Tensor]] = {}
    print(f"{path}: {len(loader) * batch_size} images, {batch_size} at a time, {torch.get_num_threads()} threads")
    for name, model in rows.items():
        started = time.process_time()
        outputs[name] = [model(each) for each, _ in loader]
        taken = (time.process_time() - started) / len(outputs[name]) / batch_size
        found = [detections for each in outputs[name] for detections in detect(each, size, confidence=0.01)]
        precision = mean_average_precision(found, [each for _, targets in loader for each in targets], len(names), size)
        shown = f"Mean AP {precision[0]:.4f}  at 0.5 {precision[1]:.4f}"
        print(f"{name:18} {shown}  {1000 * taken:.2f} ms of processor time an image")
    ways = [each for name, each in outputs.items() if name.startswith("integers")]
    same = all(torch.equal(each, first) for first, *others in zip(*ways, strict=True) for each in others)
    print("integers operator by operator, fused and offline: " + ("the same bits" if same else "DIFFERENT"))
    print(f"files: checkpoint {path.stat().st_size / 2**20:.1f} MiB, offline model {offline.size / 2**20:.1f} MiB")


def _calibrated(trained: nn.Module, fresh: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns the model with measured scales, on the emulated card, which computes with integers."""
    from torch_mlu.core import mlu_quantize

    measured = mlu_quantize.quantize_dynamic_mlu(trained, {"per_channel": True}, dtype="int8", gen_quant=True)
    measured(images)
    quantized = mlu_quantize.quantize_dynamic_mlu(fresh)
    quantized.load_state_dict(measured.state_dict())
    quantized.eval().to("mlu")
    return lambda x: quantized(x.to("mlu")).cpu()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, help="default: of the newest run")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=16)
    options = parser.parse_args()
    try:
        main(options.checkpoint or newest_run(), options.images, options.batch_size)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
