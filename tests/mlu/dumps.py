"""What the dump tool wrote, read again."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnmix.torch_mlu.core.dumptool import Dumper

CARD = "mlu"


def folders(path: str | Path) -> list[str]:
    names = [each.name for each in Path(path).iterdir() if each.is_dir()]
    return sorted(names, key=lambda name: int(name.split("_")[0]))


def files(path: str | Path) -> list[str]:
    return sorted(each.name for each in Path(path).iterdir() if each.is_file())


def lines(path: str | Path) -> list[str]:
    return Path(path).read_text().splitlines()


def assert_is(path: Path, expected: Tensor) -> None:
    """Checks that a file of level 2 has exactly this tensor, to the six digits that are written."""
    header, *values = lines(path)
    found = re.fullmatch(r"Tensor : Type = (\w+) : Shape = (\[.*\]) : Stride = (\[.*\]) : Dumped = (\d+)", header)
    assert found is not None, header
    assert found[2] == str(list(expected.shape))
    assert int(found[4]) == expected.numel() == len(values)
    written = torch.tensor([float(each) for each in values], dtype=torch.float64)
    torch.testing.assert_close(written, expected.detach().cpu().double().reshape(-1), rtol=1e-5, atol=0, equal_nan=True)


def dumped(function: Any, **options: Any) -> Path:
    with Dumper("here", **options) as dumper:
        function()
    return Path(dumper.dump_dir)
