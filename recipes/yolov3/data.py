"""Images with boxes: geometric shapes that are drawn here, and folders of images with labels in YOLO's format."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

SHAPES = ("circle", "square", "triangle", "star", "cross")
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
GREY = 128  # of the bars that letterboxing leaves, as darknet's

Sample = tuple[Tensor, Tensor]


class ShapeImages(Dataset[Sample]):
    """Draws circles, squares, triangles, stars and crosses on noisy backgrounds; each image from its numbers alone.

    A sample is an image, float32 in [0, 1], (3, size, size), and its objects, float32 (objects, 5): class, centre x,
    centre y, width and height in pixels.

    Args:
        count: how many images there are, at least 1.
        size: height and width of an image in pixels, at least 32.
        seed: of the set; another seed is another set.

    Raises:
        ValueError: an argument is out of its range.
    """

    names = SHAPES

    def __init__(self, count: int, size: int = 128, seed: int = 0) -> None:
        for name, value, least in (("count", count, 1), ("size", size, 32), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        self.count, self.size, self.seed, self.epoch = count, size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the images: those of another epoch are others, so that training never sees one twice."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(f"there are {self.count} images, and none with index {index}")
        chance = random.Random(f"{self.seed} {self.epoch} {index}")  # a string: hashed the same everywhere
        image = Image.new("RGB", (self.size, self.size), _colour(chance))
        draw = ImageDraw.Draw(image)
        for _ in range(chance.randrange(4)):  # lines that are no object
            ends = [chance.uniform(0, self.size) for _ in range(4)]
            draw.line(ends, fill=_colour(chance), width=chance.randint(1, 2))
        objects: list[tuple[int, float, float, float, float]] = []
        taken: list[tuple[float, float, float]] = []
        for _ in range(chance.randint(1, 6)):
            radius = self.size * math.exp(chance.uniform(math.log(0.07), math.log(0.25)))
            x, y = (chance.uniform(radius, self.size - radius) for _ in range(2))
            if any(math.hypot(x - a, y - b) < 0.8 * (radius + other) for a, b, other in taken):
                continue  # objects touch, but none hides another
            taken.append((x, y, radius))
            name = chance.randrange(len(SHAPES))
            colour = _colour(chance)
            while _distance(colour, image.getpixel((int(x), int(y)))) < 90:  # a shape that nobody sees is no object
                colour = _colour(chance)
            left, top, right, bottom = _draw(draw, SHAPES[name], x, y, radius, chance.uniform(-0.4, 0.4), colour)
            objects.append((name, (left + right) / 2, (top + bottom) / 2, right - left, bottom - top))
        pixels = np.asarray(image, dtype=np.float32)
        noise = np.random.default_rng(chance.getrandbits(64)).standard_normal(pixels.shape, dtype=np.float32)
        pixels = (pixels + chance.uniform(0, 16) * noise).clip(0, 255) / 255
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), torch.tensor(objects).view(-1, 5)


class LabelledImages(Dataset[Sample]):
    """Images of a folder with labels in YOLO's format, letterboxed: ``images/<part>/x.jpg``, ``labels/<part>/x.txt``.

    A label file has a line for each object: class, centre x, centre y, width, height, as shares of the image. An image
    without a file has none. A sample is as of ``ShapeImages``; objects are where letterboxing puts them.

    Args:
        path: folder with ``images`` and ``labels``.
        part: folder in each of the two, as ``train``.
        size: height and width of a sample in pixels.
        names: of the classes.
        flip: mirror an image, left to right, in every second epoch of it, by chance.

    Raises:
        FileNotFoundError: if there is no such folder, or no image in it.
    """

    def __init__(self, path: str | Path, part: str, size: int, names: Sequence[str], flip: bool = False) -> None:
        folder = Path(path) / "images" / part
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}: data.path needs images/{part} and labels/{part}")
        self.files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not self.files:
            raise FileNotFoundError(f"{folder} has no images ({', '.join(SUFFIXES)})")
        self.labels = [
            (Path(path) / "labels" / part / file.relative_to(folder)).with_suffix(".txt") for file in self.files
        ]
        self.size, self.names, self.flip, self.epoch = size, tuple(names), flip, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses which images are mirrored."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        with Image.open(self.files[index]) as image:
            pixels, scale, left, top = letterbox(image.convert("RGB"), self.size)
            width, height = image.size
        objects = read_labels(self.labels[index], len(self.names))
        objects[:, 1:] *= torch.tensor([width, height, width, height]) * scale
        objects[:, 1:3] += torch.tensor([left, top])
        if self.flip and random.Random(f"{self.epoch} {index}").random() < 0.5:
            pixels = pixels.flip(2)
            objects[:, 1] = self.size - objects[:, 1]
        return pixels, objects


def letterbox(image: Image.Image, size: int) -> tuple[Tensor, float, int, int]:
    """Fits an image into a square without changing its proportions, with grey bars.

    Args:
        image: in RGB.
        size: height and width of the square, in pixels.

    Returns:
        The square, float32 in [0, 1], (3, size, size); what the image was scaled by; where its left and its top are.
    """
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    left, top = (size - width) // 2, (size - height) // 2
    square = Image.new("RGB", (size, size), (GREY, GREY, GREY))
    square.paste(image.resize((width, height), Image.Resampling.BILINEAR), (left, top))
    pixels = np.asarray(square, dtype=np.float32).transpose(2, 0, 1) / 255
    return torch.from_numpy(pixels.copy()), scale, left, top


def read_labels(file: Path, classes: int) -> Tensor:
    """Reads a label file of YOLO's format.

    Args:
        file: which; none is no object.
        classes: how many there are.

    Returns:
        Float32 (objects, 5): class, centre x, centre y, width and height as shares of the image.

    Raises:
        ValueError: if a line is not of this form, naming it.
    """
    if not file.is_file():
        return torch.zeros(0, 5)
    objects = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            name, *place = (float(each) for each in line.split())
        except ValueError:
            name, place = -1.0, []
        if len(place) != 4 or name != int(name) or not all(0 <= each <= 1 for each in place):
            raise ValueError(f"{file}:{number}: must be a class and four numbers from 0 to 1, got {line!r}")
        if not 0 <= name < classes:
            raise ValueError(f"{file}:{number}: class {int(name)} is not one of the {classes} that data.names has")
        objects.append([name, *place])
    return torch.tensor(objects).view(-1, 5)


def collate(samples: Sequence[Sample]) -> tuple[Tensor, list[Tensor]]:
    """Returns a batch: images (N, 3, size, size), and for each its objects."""
    return torch.stack([image for image, _ in samples]), [objects for _, objects in samples]


def find_anchors(sizes: Tensor, count: int = 9, steps: int = 50) -> list[list[float]]:
    """Finds the anchors that overlap boxes best, by k-means with 1 − intersection over union as the distance.

    Args:
        sizes: widths and heights of boxes in pixels, (boxes, 2); at least ``count`` of them.
        count: how many anchors.
        steps: most passes of k-means.

    Returns:
        Pairs of width and height in pixels, the smallest first.

    Raises:
        ValueError: if there are fewer boxes than anchors.
    """
    if len(sizes) < count:
        raise ValueError(f"{count} anchors need as many boxes, and there are {len(sizes)}")
    by_area = sizes[sizes.prod(1).argsort()]
    anchors = by_area[torch.linspace(0, len(sizes) - 1, 2 * count + 1).long()[1::2]]  # quantiles: no chance in it
    for _ in range(steps):
        nearest = size_overlaps(sizes, anchors).argmax(1)
        moved = torch.stack(
            [
                sizes[nearest == each].median(0).values if (nearest == each).any() else anchors[each]
                for each in range(count)
            ]
        )
        if torch.equal(moved, anchors):
            break
        anchors = moved
    return anchors[anchors.prod(1).argsort()].tolist()


def size_overlaps(first: Tensor, second: Tensor) -> Tensor:
    """Returns the intersection over union, (N, M), of boxes with one centre, by width and height (N, 2) and (M, 2)."""
    shared = torch.minimum(first[:, None], second[None]).prod(-1)
    return shared / (first.prod(1)[:, None] + second.prod(1)[None] - shared)


def _colour(chance: random.Random) -> tuple[int, int, int]:
    return chance.randrange(256), chance.randrange(256), chance.randrange(256)


def _distance(first: Sequence[int], second: Sequence[int]) -> float:
    return math.dist(first, second)


def _draw(
    draw: ImageDraw.ImageDraw, name: str, x: float, y: float, radius: float, angle: float, colour: tuple[int, int, int]
) -> tuple[float, float, float, float]:
    """Draws a shape around a centre and returns left, top, right and bottom of what was drawn."""
    if name == "circle":
        points = [(x - radius, y - radius), (x + radius, y + radius)]
        draw.ellipse([*points[0], *points[1]], fill=colour)
    else:
        # Corners as (radius, angle): of a square, a triangle, a star with five points, a cross of four arms.
        arm = math.atan(0.35)
        inner = math.sqrt(2) * math.sin(arm)
        shape = {
            "square": [(1.0, math.pi / 2 * each) for each in range(4)],
            "triangle": [(1.0, 2 * math.pi / 3 * each) for each in range(3)],
            "star": [(1.0 if each % 2 == 0 else 0.45, math.pi / 5 * each) for each in range(10)],
            "cross": [
                (length, math.pi / 2 * each + turn)
                for each in range(4)
                for length, turn in ((1.0, -arm), (1.0, arm), (inner, math.pi / 4))
            ],
        }[name]
        points = [
            (x + radius * length * math.cos(angle + turn), y + radius * length * math.sin(angle + turn))
            for length, turn in shape
        ]
        draw.polygon(points, fill=colour)
    across, down = zip(*points, strict=True)
    return min(across), min(down), max(across), max(down)
