"""Boxes: their overlap, non-maximum suppression, and COCO's mean average precision."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def corners(boxes: Tensor) -> Tensor:
    """Returns boxes (..., 4) of centre x, centre y, width, height as left, top, right, bottom."""
    half = boxes[..., 2:4] / 2
    return torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], -1)


def overlaps(first: Tensor, second: Tensor) -> Tensor:
    """Returns the intersection over union of every pair, (N, M), of boxes (N, 4) and (M, 4) given by their corners."""
    shared = torch.minimum(first[:, None, 2:], second[None, :, 2:]) - torch.maximum(
        first[:, None, :2], second[None, :, :2]
    )
    shared = shared.clamp(min=0).prod(-1)
    area = [(each[:, 2:] - each[:, :2]).clamp(min=0).prod(-1) for each in (first, second)]
    return shared / (area[0][:, None] + area[1][None, :] - shared).clamp(min=1e-12)


def suppress(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression: keeps a box unless one of its class with a higher score overlaps it more.

    Args:
        boxes: corners, (N, 4), in pixels.
        scores: (N,).
        classes: int64, (N,).
        threshold: intersection over union from which two boxes are of one object, in [0, 1].

    Returns:
        Indices of the boxes to keep, by falling score, int64.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, classes = boxes[order], classes[order]
    same = (overlaps(boxes, boxes) > threshold) & (classes[:, None] == classes[None, :])
    worse = same.triu(1).numpy()
    kept = np.ones(len(boxes), dtype=bool)
    for index in range(len(boxes)):
        if kept[index]:
            kept &= ~worse[index]
    return order[torch.from_numpy(kept)]


@torch.no_grad()
def detect(
    output: Tensor,
    image_size: int,
    confidence: float = 0.05,
    overlap: float = 0.45,
    most: int = 100,
    candidates: int = 1000,
) -> list[Tensor]:
    """Turns what a ``YOLOv3`` returns in evaluation into detections, in the form that the vendor's scripts have.

    Args:
        output: (N, boxes, 5 + classes).
        image_size: height and width of the images, in pixels; boxes are cut at the edges.
        confidence: least score, object's probability times class's.
        overlap: intersection over union from which two boxes of a class are of one object.
        most: detections kept of an image.
        candidates: boxes of an image that compete, the best first.

    Returns:
        For each image (detections, 7), float32 on the CPU, by falling score: left, top, right, bottom in pixels, the
        probability of an object, that of the class, the class.
    """
    found = []
    for boxes in output.detach().float().cpu():
        scores, best = (boxes[:, 4:5] * boxes[:, 5:]).max(1)
        good = scores.nan_to_num(0.0) > confidence
        scores, best, boxes = scores[good], best[good], boxes[good]
        if len(scores) > candidates:
            scores, top = scores.topk(candidates)
            best, boxes = best[top], boxes[top]
        edges = corners(boxes[:, :4]).nan_to_num(0.0).clamp(0, image_size)
        kept = suppress(edges, scores, best, overlap)[:most]
        chosen = boxes[kept, 5:].gather(1, best[kept, None])
        found.append(torch.cat([edges[kept], boxes[kept, 4:5], chosen, best[kept, None].float()], 1))
    return found


def mean_average_precision(
    detections: Sequence[Tensor], targets: Sequence[Tensor], classes: int, image_size: int
) -> tuple[float, float]:
    """Returns COCO's mean average precision, computed by pycocotools.

    Args:
        detections: for each image what ``detect`` returns.
        targets: for each image its objects, (objects, 5): class, centre x, centre y, width and height in pixels.
        classes: how many there are.
        image_size: height and width of the images, in pixels.

    Returns:
        The mean over the overlaps 0.5, 0.55 ... 0.95, and that at 0.5; in [0, 1].

    Raises:
        ImportError: if pycocotools is not installed.
        ValueError: if the numbers of images differ, or there is no object.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if len(detections) != len(targets):
        raise ValueError(f"there are detections of {len(detections)} images and objects of {len(targets)}")
    if not any(len(each) for each in targets):
        raise ValueError("there is no object in the images: a precision needs at least one")
    objects, results = [], []
    for image, (found, objects_here) in enumerate(zip(detections, targets, strict=True), start=1):
        for row in objects_here.tolist():
            name, x, y, w, h = row
            place = [x - w / 2, y - h / 2, w, h]
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": image,
                    "category_id": int(name),
                    "bbox": place,
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
        for left, top, right, bottom, thing, sort, name in found.tolist():
            place = [left, top, right - left, bottom - top]
            results.append({"image_id": image, "category_id": int(name), "bbox": place, "score": thing * sort})
    if not results:
        return 0.0, 0.0
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": image + 1, "width": image_size, "height": image_size} for image in range(len(targets))],
        "categories": [{"id": each} for each in range(classes)],
        "annotations": objects,
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it tells what it does
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0]), float(evaluation.stats[1])
