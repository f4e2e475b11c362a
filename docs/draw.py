"""Draws the pictures of the documentation with the library's own functions, and from the benchmarks' result files.

    python docs/draw.py              # all, into docs/figures
    python docs/draw.py position     # one

What trains here does so in seconds, on the digits recipe.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import matplotlib as mpl
import torch
from drawing import FIGURES, ROOT, STYLE


def main(names: list[str], folder: Path = ROOT / "docs" / "figures") -> None:
    """Draws the named pictures into a folder; all where none is named."""
    torch.set_num_threads(1)
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or FIGURES:
        with mpl.rc_context(STYLE):
            FIGURES[name]().savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1:])
