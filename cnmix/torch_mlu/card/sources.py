"""Compiles the card for the PyTorch that is installed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_SOURCES = (
    "memory.cpp",
    "device.cpp",
    "fallback.cpp",
    "strict.cpp",
    "operators.cpp",
    "products.cpp",
    "networks.cpp",
    "collectives.cpp",
    "autocast.cpp",
)
_HEADERS = ("card.h",)


def build() -> Path:
    """Returns the compiled library, and compiles it where the cache has none for these sources and this PyTorch.

    Raises:
        RuntimeError: if there is no C++ compiler, or it refuses the sources.
    """
    compiler = _compiler()
    root = Path(torch.__file__).parent
    flags = [
        *("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-w"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        *(f"-I{root / 'include' / part}" for part in ("", "torch/csrc/api/include")),
    ]
    key = hashlib.sha256("\0".join([torch.__version__, str(root), compiler, *flags]).encode())
    for name in (*_SOURCES, *_HEADERS):
        key.update((_FOLDER / name).read_bytes())
    cache = _cache()
    target = cache / f"card-{key.hexdigest()[:16]}.so"
    with _locked(cache / "card.lock"):
        if not target.exists():
            print(f"cnmix: compiling the emulated card for PyTorch {torch.__version__}, once", file=sys.stderr)
            _compile(compiler, flags, root / "lib", target)
    return target


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = name and shutil.which(name)
        if found:
            return found
    raise RuntimeError(
        "the emulated card is compiled once for each version of PyTorch, and no C++ compiler was found: install g++ or "
        "clang++, or name one in the environment variable CXX"
    )


def _cache() -> Path:
    """Returns the folder for compiled libraries: the user's cache, or a temporary one where that cannot be written."""
    wanted = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cnmix"
    with contextlib.suppress(OSError):
        wanted.mkdir(parents=True, exist_ok=True)
        if os.access(wanted, os.W_OK):
            return wanted
    other = Path(tempfile.gettempdir()) / f"cnmix-{os.getuid()}"
    other.mkdir(mode=0o700, exist_ok=True)
    if other.stat().st_uid != os.getuid():
        raise RuntimeError(f"neither {wanted} nor {other} can be written: set XDG_CACHE_HOME to a folder that can")
    return other


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lets one process compile, while the others wait for it."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(compiler: str, flags: list[str], libraries: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [Path(folder) / f"{Path(name).stem}.o" for name in _SOURCES]
        jobs = [
            subprocess.Popen(
                [compiler, *flags, "-c", str(_FOLDER / name), "-o", str(compiled)],
                stderr=subprocess.PIPE,
                text=True,
            )
            for name, compiled in zip(_SOURCES, objects, strict=True)
        ]
        outputs = [job.communicate()[1] for job in jobs]
        for name, job, output in zip(_SOURCES, jobs, outputs, strict=True):
            if job.returncode != 0:
                raise RuntimeError(
                    f"{compiler} could not compile the emulated card's {name} for PyTorch {torch.__version__} (the one "
                    f"that it is tested with is in constraints.txt):\n{output[:4000]}"
                )
        linked = Path(folder) / target.name
        link = [compiler, "-shared", "-o", str(linked), *map(str, objects), f"-L{libraries}", "-ltorch_cpu", "-lc10"]
        found = subprocess.run([*link, f"-Wl,-rpath,{libraries}"], capture_output=True, text=True)
        if found.returncode != 0:
            raise RuntimeError(f"{compiler} could not link the emulated card:\n{found.stderr[:4000]}")
        linked.replace(target)
