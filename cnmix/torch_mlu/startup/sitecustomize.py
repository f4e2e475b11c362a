"""Puts the emulated ``torch_mlu`` in place when PyTorch is imported, in what ``cnmix run`` started or below it.

The folder of this file is first in ``PYTHONPATH`` there. It changes nothing until torch is imported, and gives way to a
``sitecustomize`` of the environment's own.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType


class _AtTorch(importlib.abc.MetaPathFinder):
    """Finds torch as the others do, and installs when it has been imported; the vendor's names import it first."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name in ("torch_mlu", "catch_perf") and "torch" not in sys.modules:
            importlib.import_module("torch")
            return importlib.util.find_spec(name)
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Installing(spec.loader)
        return spec


class _Installing(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        from cnmix.torch_mlu import install

        install()


def _give_way() -> None:
    """Runs the ``sitecustomize`` that this one hides."""
    folder = os.path.dirname(os.path.abspath(__file__))
    others = [each for each in sys.path if os.path.abspath(each or os.getcwd()) != folder]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if os.environ.get("CNMIX_TORCH_MLU") == "1":
    sys.meta_path.insert(0, _AtTorch())
_give_way()
