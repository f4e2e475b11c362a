"""The loss of YOLOv3: which boxes are for which objects, and what they should have said."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from data import size_overlaps
from detection import corners, overlaps
from model import decode, flatten, priors
from torch import Tensor, nn
from torch.nn import functional as F


class Loss(nn.Module):
    """Binary cross entropy of objectness and classes, complete-IoU loss (arXiv:1911.08287) of boxes.

    An object is for the box, in the cell of its centre, of the anchor that is most like it, as in the paper, and for
    those of further anchors that are enough like it. A box that overlaps an object well without being for it is not
    told that there is none. The paper's squared errors of centre and size are replaced by the overlap itself, which is
    what the precision measures.

    Args:
        image_size: height and width of the images, in pixels.
        anchors: nine pairs of width and height in pixels.
        alike: least overlap of an object with a further anchor.
        ignore: overlap with an object from which a box that is for none is left alone.
        box_weight: factor on the boxes' loss.
        class_weight: on the classes'.
    """

    def __init__(
        self,
        image_size: int,
        anchors: Sequence[Sequence[float]],
        alike: float = 0.4,
        ignore: float = 0.6,
        box_weight: float = 3.0,
        class_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.image_size, self.alike, self.ignore = image_size, alike, ignore
        self.box_weight, self.class_weight = box_weight, class_weight
        self.offsets, self.strides, self.sizes = priors(image_size, anchors)
        self.cells = [round(image_size / stride) for stride in (32, 16, 8)]
        # By anchor, the smallest first: stride, cells in a row, first box of its scale, place among the scale's three.
        starts = [0, 3 * self.cells[0] ** 2, 3 * (self.cells[0] ** 2 + self.cells[1] ** 2)]
        self.places = [
            (8 << index // 3, self.cells[2 - index // 3], starts[2 - index // 3], index % 3) for index in range(9)
        ]
        self.anchors = torch.tensor(anchors, dtype=torch.float32)

    def forward(self, maps: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Returns the loss of a batch, and its parts by name.

        Args:
            maps: as ``YOLOv3`` returns them in training.
            targets: for each image its objects, (objects, 5): class, centre x, centre y, width, height in pixels.
        """
        raw = flatten(maps)
        decoded = decode(maps, self.offsets, self.strides, self.sizes)
        images, boxes, objects = self.assign(targets)
        truth = torch.cat(list(targets))
        wanted = torch.zeros(raw.shape[:2])
        wanted[images, boxes] = 1
        judged = (wanted == 1) | ~self._overlapping(decoded[..., :4].detach(), targets)
        objectness = F.binary_cross_entropy_with_logits(raw[..., 4], wanted, reduction="none")
        count = max(len(images), 1)
        parts = {"objectness": objectness[judged].sum() / count}
        parts["box"] = self.box_weight * complete_iou_loss(decoded[images, boxes, :4], truth[objects, 1:]).sum() / count
        classes = F.one_hot(truth[objects, 0].long(), raw.shape[2] - 5).float()
        named = F.binary_cross_entropy_with_logits(raw[images, boxes, 5:], classes, reduction="sum")
        parts["class"] = self.class_weight * named / count
        return sum(parts.values()), {name: float(value.detach()) for name, value in parts.items()}

    def assign(self, targets: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Chooses the boxes that are for an object: image, box, object in all of the batch; int64, (matches,) each."""
        matches: dict[tuple[int, int], int] = {}
        number = 0
        for image, objects in enumerate(targets):
            alike = size_overlaps(objects[:, 3:], self.anchors)
            best = alike.argmax(1)
            for row in range(len(objects)):
                x, y = objects[row, 1].item(), objects[row, 2].item()
                chosen = [each for each in range(9) if each != best[row] and alike[row, each] >= self.alike]
                for anchor in [*chosen, int(best[row])]:
                    stride, cells, start, place = self.places[anchor]
                    column, line = (min(max(int(each / stride), 0), cells - 1) for each in (x, y))
                    box = start + 3 * (line * cells + column) + place
                    if anchor == best[row] or (image, box) not in matches:
                        matches[image, box] = number + row
            number += len(objects)
        rows = torch.tensor([[*place, item] for place, item in matches.items()], dtype=torch.int64).view(-1, 3)
        return rows[:, 0], rows[:, 1], rows[:, 2]

    def _overlapping(self, boxes: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """Returns, for each image and box, whether it overlaps an object by more than ``ignore``."""
        found = torch.zeros(boxes.shape[:2], dtype=torch.bool)
        for image, objects in enumerate(targets):
            if len(objects):
                shared = overlaps(corners(boxes[image]), corners(objects[:, 1:]))
                found[image] = shared.max(1).values > self.ignore
        return found


def complete_iou_loss(boxes: Tensor, truth: Tensor) -> Tensor:
    """Returns 1 − complete IoU, (N,), of boxes and their objects, (N, 4) each, by centre, width and height."""
    first, second = corners(boxes), corners(truth)
    shared = (
        (torch.minimum(first[:, 2:], second[:, 2:]) - torch.maximum(first[:, :2], second[:, :2])).clamp(min=0).prod(1)
    )
    union = boxes[:, 2:].prod(1) + truth[:, 2:].prod(1) - shared
    overlap = shared / union.clamp(min=1e-9)
    around = torch.maximum(first[:, 2:], second[:, 2:]) - torch.minimum(first[:, :2], second[:, :2])
    apart = (boxes[:, :2] - truth[:, :2]).square().sum(1) / around.square().sum(1).clamp(min=1e-9)
    turn = torch.atan(truth[:, 2] / truth[:, 3]) - torch.atan(boxes[:, 2] / boxes[:, 3].clamp(min=1e-9))
    proportion = 4 / math.pi**2 * turn.square()
    weight = proportion.detach() / (1 - overlap.detach() + proportion.detach()).clamp(min=1e-9)
    return 1 - overlap + apart + weight * proportion
