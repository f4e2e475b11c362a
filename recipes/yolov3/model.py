"""YOLOv3 (Redmon and Farhadi, arXiv:1804.02767) in plain PyTorch: Darknet-53, and heads at three scales.

The convolutions stand in the order of darknet's ``yolov3.cfg``, which is the order of its files of weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Widths and heights in pixels of darknet's yolov3.cfg, for images of 416: three for each scale, the smallest first.
COCO_ANCHORS = ((10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326))
# Of the three scales, in pixels; anchors are for the smallest stride first, heads for the largest.
STRIDES = (8, 16, 32)


class Convolution(nn.Module):
    """Convolution without bias, batch normalization, LeakyReLU(0.1).

    Args:
        inputs: channels in.
        outputs: channels out.
        kernel: its size; the padding keeps the size of the image.
        stride: of the convolution.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.LeakyReLU(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns features (N, outputs, H / stride, W / stride) of (N, inputs, H, W)."""
        return self.act(self.bn(self.conv(x)))


class Residual(nn.Module):
    """A 1x1 convolution to half of the channels and a 3x3 one back, added to what came in.

    Args:
        channels: in and out.
        hidden: between the two.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = Convolution(channels, hidden, 1)
        self.conv2 = Convolution(hidden, channels, 3)
        nn.init.zeros_(self.conv2.bn.weight)  # begins as the identity: a net this deep learns sooner (arXiv:1706.02677)

    def forward(self, x: Tensor) -> Tensor:
        """Returns features of the shape of ``x``."""
        return x + self.conv2(self.conv1(x))


class Head(nn.Module):
    """What a scale has of its own: five convolutions, whose output the next scale takes too, and two to the map.

    Args:
        inputs: channels in.
        channels: of its narrow convolutions.
        wide: channels of its wide ones.
        outputs: channels of the map.
    """

    def __init__(self, inputs: int, channels: int, wide: int, outputs: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            Convolution(inputs, channels, 1),
            Convolution(channels, wide, 3),
            Convolution(wide, channels, 1),
            Convolution(channels, wide, 3),
            Convolution(wide, channels, 1),
        )
        self.wide = Convolution(channels, wide, 3)
        self.map = nn.Conv2d(wide, outputs, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what the next scale takes, (N, channels, H, W), and the map, (N, outputs, H, W)."""
        x = self.trunk(x)
        return x, self.map(self.wide(x))


class YOLOv3(nn.Module):
    """YOLOv3 for images of one size.

    Args:
        classes: how many there are, at least 1.
        width: factor on the channels of all convolutions but the maps'; 1 is the real network. Channels are rounded to
            multiples of 8.
        image_size: height and width of the images in pixels, a multiple of 32.
        anchors: nine pairs of width and height in pixels, the smallest first; COCO's, scaled to ``image_size``, where
            None.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        classes: int = 80,
        width: float = 1.0,
        image_size: int = 416,
        anchors: Sequence[Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(classes, bool) or not isinstance(classes, int) or classes < 1:
            raise ValueError(f"classes must be an integer of at least 1, got {classes!r}")
        if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width <= 8:
            raise ValueError(f"width must be a number above 0 and up to 8, got {width!r}")
        if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 32 or image_size % 32:
            raise ValueError(f"image_size must be a multiple of 32, the largest stride, got {image_size!r}")
        if anchors is None:
            anchors = [[side * image_size / 416 for side in pair] for pair in COCO_ANCHORS]
        if len(anchors) != 9 or any(len(pair) != 2 or min(pair) <= 0 for pair in anchors):
            raise ValueError(f"anchors must be nine pairs of a width and a height above 0, got {anchors!r}")
        self.classes, self.width, self.image_size = classes, width, image_size
        self.anchors = tuple((float(pair[0]), float(pair[1])) for pair in anchors)

        def scaled(channels: int) -> int:
            return max(8, round(channels * width / 8) * 8)

        channels = [scaled(each) for each in (32, 64, 128, 256, 512, 1024)]
        self.stem = Convolution(3, channels[0], 3)
        self.stages = nn.ModuleList(
            nn.Sequential(
                Convolution(inputs, outputs, 3, stride=2), *(Residual(outputs, inputs) for _ in range(repeats))
            )
            for inputs, outputs, repeats in zip(channels, channels[1:], (1, 2, 8, 8, 4), strict=False)
        )
        outputs = 3 * (5 + classes)
        c128, c256, c512, c1024 = channels[2:]
        self.head32 = Head(c1024, c512, c1024, outputs)
        self.to16 = Convolution(c512, c256, 1)
        self.head16 = Head(c256 + c512, c256, c512, outputs)
        self.to8 = Convolution(c256, c128, 1)
        self.head8 = Head(c128 + c256, c128, c256, outputs)

        for head in (
            self.head32,
            self.head16,
            self.head8,
        ):  # most boxes have no object: begin with a probability of 1 %
            nn.init.constant_(head.map.bias.view(3, -1)[:, 4], -4.6)

        # Constants of ``decode``; a state_dict has weights alone.
        for name, value in zip(("offsets", "strides", "sizes"), priors(image_size, self.anchors), strict=True):
            self.register_buffer(name, value, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor] | Tensor:
        """Finds objects.

        Args:
            images: RGB in [0, 1], shape (N, 3, H, W), H and W multiples of 32; both ``image_size`` in evaluation.

        Returns:
            In training the maps of the strides 32, 16 and 8, each (N, 3 · (5 + classes), H / stride, W / stride),
            before any activation. In evaluation what ``decode`` makes of them.
        """
        maps = self.maps(images)
        if self.training:
            return maps
        return decode(maps, self.offsets, self.strides, self.sizes)

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the three maps; see ``forward``."""
        features = []
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        narrow, map32 = self.head32(features[4])
        narrow, map16 = self.head16(torch.cat([_upsample(self.to16(narrow)), features[3]], 1))
        _, map8 = self.head8(torch.cat([_upsample(self.to8(narrow)), features[2]], 1))
        return map32, map16, map8

    def backbone(self) -> list[nn.Module]:
        """Returns the parts that darknet calls ``darknet53.conv.74``."""
        return [self.stem, *self.stages]


def _upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def priors(image_size: int, anchors: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what ``decode`` needs to know of each box: all of the largest stride first, row by row, cell by cell.

    Args:
        image_size: height and width of the images in pixels.
        anchors: nine pairs of width and height in pixels.

    Returns:
        Column and row of its cell, float32 (1, boxes, 2); the stride in pixels, (1, boxes, 1); the anchor's width and
        height in pixels, (1, boxes, 2).
    """
    offsets, strides, sizes = [], [], []
    for scale in (2, 1, 0):
        cells = image_size // STRIDES[scale]
        rows, columns = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
        cell = torch.stack([columns, rows], -1).view(-1, 1, 2).expand(-1, 3, -1).reshape(-1, 2)
        offsets.append(cell.float())
        strides.append(torch.full((len(cell), 1), float(STRIDES[scale])))
        sizes.append(torch.tensor(anchors[3 * scale : 3 * scale + 3]).float().repeat(cells * cells, 1))
    return torch.cat(offsets).unsqueeze(0), torch.cat(strides).unsqueeze(0), torch.cat(sizes).unsqueeze(0)


def flatten(maps: Sequence[Tensor]) -> Tensor:
    """Returns maps (N, 3 · values, H, W), in the order of ``priors``, as (N, boxes, values)."""
    flat = []
    for each in maps:
        batch, channels = each.shape[:2]
        flat.append(each.permute(0, 2, 3, 1).reshape(batch, -1, channels // 3))
    return torch.cat(flat, 1)


def decode(maps: Sequence[Tensor], offsets: Tensor, strides: Tensor, sizes: Tensor) -> Tensor:
    """Turns maps into boxes, with nothing but operations on tensors of fixed shapes.

    Args:
        maps: as ``YOLOv3`` returns them in training.
        offsets: from ``priors``.
        strides: likewise.
        sizes: likewise.

    Returns:
        Shape (N, boxes, 5 + classes): centre x, centre y, width and height in pixels, the probability that there is an
        object, and the probability of each class if there is one.
    """
    raw = flatten(maps)
    centres = (torch.sigmoid(raw[..., :2]) + offsets) * strides
    extents = torch.exp(raw[..., 2:4]) * sizes
    return torch.cat([centres, extents, torch.sigmoid(raw[..., 4:])], -1)
