"""Trains YOLOv3 with cnmix: python recipes/yolov3/train.py [SETTINGS.yaml] [key=value ...].

Leaves runs/yolov3/<time>/ with the settings, metrics, the checkpoint and pictures of what was found.
"""

from __future__ import annotations

import csv
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from data import SHAPES, Sample, find_anchors
from detection import detect, mean_average_precision
from loss import Loss
from model import YOLOv3
from omegaconf import DictConfig, OmegaConf
from pictures import save_picture
from settings import batches, load_data, read_settings
from torch import Tensor, nn
from torch.utils.data import DataLoader
from weights import load as load_weights

import cnmix
from cnmix.recipe import load_section

SHOWN = 16  # pictures
CHECKPOINT = "yolov3.pt"


def build_model(settings: DictConfig) -> YOLOv3:
    """Builds the network, with random weights; without anchors it has COCO's."""
    model = OmegaConf.to_container(settings.model)
    return YOLOv3(len(settings.data.names or SHAPES), model["width"], model["image_size"], model["anchors"])


@torch.no_grad()
def find(model: nn.Module, loader: DataLoader[Sample], image_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields each image, what the model finds in it and its objects."""
    model.eval()
    for images, targets in loader:
        yield from zip(images, detect(model(images), image_size, confidence=0.01), targets, strict=True)


def evaluate(
    model: nn.Module, loader: DataLoader[Sample], settings: DictConfig, pictures: Path | None = None
) -> tuple[float, float]:
    """Returns the mean average precision over overlaps of 0.5 to 0.95, and at 0.5.

    Args:
        model: a ``YOLOv3``.
        loader: of test images.
        settings: of the run.
        pictures: folder for the first images with what was found in them.
    """
    size, names = settings.model.image_size, settings.data.names or SHAPES
    found, objects = [], []
    for number, (image, detections, targets) in enumerate(find(model, loader, size)):
        found.append(detections)
        objects.append(targets)
        if pictures is not None and number < SHOWN:
            good = detections[detections[:, 4] * detections[:, 5] > 0.3]
            save_picture(pictures / f"{number:02}.png", image, good, names, scale=max(1, 512 // size))
    return mean_average_precision(found, objects, len(names), size)


def train(settings: DictConfig, folder: Path) -> dict[str, Any]:
    """Trains a model and leaves what came of it in a folder; returns the results."""
    torch.manual_seed(settings.seed)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    train_data, test_data = load_data(settings)
    if settings.model.anchors is None:
        some = range(0, len(train_data), max(1, len(train_data) // 1000))
        settings.model.anchors = find_anchors(torch.cat([train_data[index][1] for index in some])[:, 3:])
    model = build_model(settings)
    if settings.model.weights is not None:
        load_weights(model, settings.model.weights)
    loss_of = Loss(settings.model.image_size, model.anchors, **settings.loss)
    loader, test_loader = batches(train_data, settings, True), batches(test_data, settings, False)
    given = {name: value for name, value in settings.optimizer.args.items() if value is not None}
    optimizer = getattr(torch.optim, settings.optimizer.name)(model.parameters(), **given)
    section = load_section({"cnmix": OmegaConf.to_container(settings.cnmix)})
    model, optimizer = cnmix.initialize(model, optimizer, **{"steps_per_epoch": len(loader), **section})
    steps = settings.epochs * len(loader)
    warmup = math.ceil(settings.warmup * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    OmegaConf.save(settings, folder / "settings.yaml")
    started, started_work = time.perf_counter(), time.process_time()
    rows: list[dict[str, Any]] = []
    for epoch in range(settings.epochs):
        model.train()
        train_data.set_epoch(epoch)
        sums: dict[str, float] = {}
        for images, targets in loader:
            optimizer.zero_grad()
            loss, parts = loss_of(model(images), targets)
            with cnmix.scale_loss(loss, optimizer) as scaled_loss:
                scaled_loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            schedule.step()
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value / len(loader)
        row: dict[str, Any] = {"epoch": epoch + 1, **{name: round(value, 4) for name, value in sums.items()}}
        last = epoch + 1 == settings.epochs
        precision: tuple[float | None, float | None] = (None, None)
        if last or (epoch + 1) % settings.evaluate_every == 0:
            precision = evaluate(model, test_loader, settings, folder / "pictures" if last else None)
        row |= {"map": precision[0], "map50": precision[1], "seconds": round(time.perf_counter() - started, 1)}
        rows.append(row)
        print("  ".join(f"{name} {value}" for name, value in row.items() if value is not None), flush=True)
        with open(folder / "metrics.csv", "w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    results = {
        "opt_level": section.get("opt_level", "O1"),
        "map": precision[0],
        "map50": precision[1],
        "images": steps * settings.batch_size,
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - started_work,
    }
    cnmix.checkpoint.save(
        folder / CHECKPOINT, model, settings=OmegaConf.to_container(settings, resolve=True), results=results
    )
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def newest_run() -> Path:
    """Returns the checkpoint of the newest run.

    Raises:
        FileNotFoundError: if there is none.
    """
    runs = sorted(Path("runs/yolov3").glob(f"*/{CHECKPOINT}"))
    if not runs:
        raise FileNotFoundError("runs/yolov3 has no trained model: run recipes/yolov3/train.py, or name a checkpoint")
    return runs[-1]


def main(arguments: Sequence[str]) -> Path:
    """Trains as the settings say; returns the folder of the run."""
    settings = read_settings(arguments)
    folder = Path(settings.output) / "yolov3" / time.strftime("%Y-%m-%d_%H-%M-%S")
    folder.mkdir(parents=True)
    results = train(settings, folder)
    print(f"Mean AP: {results['map']:.3f} (at 0.5: {results['map50']:.3f}), {results['seconds']:.0f} s, in {folder}")
    return folder


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
