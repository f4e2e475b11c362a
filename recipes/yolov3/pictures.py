"""Pictures of what was found."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor


def save_picture(path: Path, image: Tensor, detections: Tensor, names: Sequence[str], scale: int = 1) -> None:
    """Saves an image with the boxes that were found, their classes and scores.

    Args:
        path: the file; its suffix chooses the format, and its folder is made where it is missing.
        image: RGB in [0, 1], (3, H, W).
        detections: (detections, 7), as ``detection.detect`` returns them.
        names: of the classes.
        scale: how many pixels a pixel becomes, in both directions.
    """
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    for *place, thing, sort, index in detections.flip(0).tolist():  # the best on top
        colour = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(index / len(names), 1, 1))
        left, top, right, bottom = (edge * scale for edge in place)
        draw.rectangle([left, top, right, bottom], outline=colour, width=max(1, scale // 2))
        text = f"{names[int(index)]} {thing * sort:.2f}"
        area = draw.textbbox((left, top), text)
        top = top - (area[3] - area[1]) - 4 if top > area[3] - area[1] + 4 else bottom  # above the box, or below
        draw.rectangle(draw.textbbox((left, top), text), fill=colour)
        draw.text((left, top), text, fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
