"""Compiles the card for the PyTorch that is installed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
        RuntimeError: if there is no C++ compiler, or it refuses the sources, or this is Windows.
    """
    if os.name != "posix":
        raise RuntimeError(f"the emulated card runs on Linux and macOS, not on {sys.platform}: take WSL there")
    root = Path(torch.__file__).parent
    flags = [
        *("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-w"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        *(f"-I{root / 'include' / part}" for part in ("", "torch/csrc/api/include")),
    ]
    key = hashlib.sha256("\0".join([torch.__version__, str(root), sys.platform, platform.machine(), *flags]).encode())
    for name in (*_SOURCES, *_HEADERS):
        key.update((_FOLDER / name).read_bytes())
    name = f"card-{key.hexdigest()[:16]}.so"
    wanted = _users_cache()
    if wanted is not None and os.path.exists(wanted / name):
        return wanted / name  # also from a folder that cannot be written, and without a compiler
    cache = _writable(wanted)
    with _locked(cache / "card.lock"):
        if not (cache / name).exists():
            compiler = _compiler()
            print(f"cnmix: compiling the emulated card for PyTorch {torch.__version__}, once", file=sys.stderr)
            _compile(compiler, flags, root / "lib", cache / name)
    return cache / name


def _compiler() -> list[str]:
    """Returns the compiler's command; ``CXX`` may have arguments, as in ``ccache g++``."""
    if named := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(named[0]) is None:
            raise RuntimeError(f"there is no compiler {named[0]!r}, which the environment variable CXX names")
        return named
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise RuntimeError(
        "the emulated card is compiled once for each version of PyTorch, and no C++ compiler was found: install g++ or "
        "clang++, or name one in the environment variable CXX"
    )


def _users_cache() -> Path | None:
    """Returns the user's folder for compiled libraries, or None for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cnmix"
    except RuntimeError:
        return None


def _writable(wanted: Path | None) -> Path:
    """Returns this folder, or a temporary one where it cannot be written."""
    if wanted is not None:
        with contextlib.suppress(OSError):
            wanted.mkdir(parents=True, exist_ok=True)
            if os.access(wanted, os.W_OK):
                return wanted
    other = Path(tempfile.gettempdir()) / f"cnmix-{os.getuid()}"
    other.mkdir(mode=0o700, exist_ok=True)
    if other.lstat().st_uid != os.getuid():  # what is loaded from there must be this user's
        raise RuntimeError(f"neither {wanted} nor {other} can be written: set XDG_CACHE_HOME to a folder that can")
    return other


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lets one process compile, while the others wait for it."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(compiler: list[str], flags: list[str], libraries: Path, target: Path) -> None:
    command = shlex.join(compiler)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [Path(folder) / f"{Path(name).stem}.o" for name in _SOURCES]
        steps = [
            [*compiler, *flags, "-c", str(_FOLDER / name), "-o", str(compiled)]
            for name, compiled in zip(_SOURCES, objects, strict=True)
        ]
        # Each takes about a gigabyte of memory: no more at once than there are cores.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            outputs = list(pool.map(_errors, steps))
        for name, output in zip(_SOURCES, outputs, strict=True):
            if output is not None:
                raise RuntimeError(
                    f"{command} could not compile the emulated card's {name} for PyTorch {torch.__version__} (the one "
                    f"that it is tested with is in constraints.txt):\n{output[:4000]}"
                )
        linked = Path(folder) / target.name
        link = [*compiler, "-shared", "-o", str(linked), *map(str, objects), f"-L{libraries}", "-ltorch_cpu", "-lc10"]
        output = _errors([*link, "-Xlinker", "-rpath", "-Xlinker", str(libraries)])
        if output is not None:
            raise RuntimeError(f"{command} could not link the emulated card:\n{output[:4000]}")
        linked.replace(target)


def _errors(command: list[str]) -> str | None:
    """Runs a command; returns what it says where it fails."""
    found = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    return None if found.returncode == 0 else found.stderr
