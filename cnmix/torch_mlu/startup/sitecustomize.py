"""Puts the emulated ``torch_mlu`` in place when PyTorch is imported, in what ``cnmix run`` started or below it.

The folder of this file is first in ``PYTHONPATH`` there. It changes nothing until torch is imported, and gives way to a
``sitecustomize`` of the environment's own. Any Python that a script starts comes here, also one without cnmix: what is
written here must run there.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


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
        # It stays after that: who asks for the spec may only want to know whether there is a torch, and an import that
        # fails may be tried again. The finders before this one were asked already.
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Installing(spec.loader)
                return spec
        return None


class _Tools(importlib.abc.MetaPathFinder):
    """Finds the vendor's ``metric`` where nothing else of that name is found: the last of the finders."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "metric" or importlib.util.find_spec("cnmix") is None:
            return None
        tools = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tools")
        return importlib.machinery.PathFinder.find_spec(name, [tools])


class _Installing(importlib.abc.Loader):
    """The loader that a module has, and the emulation behind it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _install()


def _install() -> None:
    try:
        from cnmix.torch_mlu import install
        from cnmix.torch_mlu.installation import vendor_package

        vendor = vendor_package()
        if vendor is not None:
            _say(f"a torch_mlu of its own is there ({vendor}): it serves, not the emulation")
            return
        install()
    except Exception as error:
        # Another Python may have no cnmix, or a PyTorch for which the card cannot be compiled; its torch works all the
        # same. In the Python of ``cnmix run`` the script would go on without what it was started with.
        if os.environ["CNMIX_TORCH_MLU"] == sys.prefix:
            raise
        _say(f"no emulated torch_mlu in {sys.executable}: {type(error).__name__}: {error}".splitlines()[0])


def _say(text: str) -> None:
    print(f"cnmix run: {text}", file=sys.stderr)


def _give_way() -> None:
    """Runs the ``sitecustomize`` that this one hides."""
    folder = os.path.dirname(os.path.abspath(__file__))
    places = [os.path.abspath(each or os.getcwd()) for each in sys.path]
    # Those behind it alone: another version's file of this kind may be there, and gives way to what is behind it.
    others = sys.path[places.index(folder) + 1 :] if folder in places else sys.path
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if os.environ.get("CNMIX_TORCH_MLU"):
    sys.meta_path.insert(0, _AtTorch())
    sys.meta_path.append(_Tools())
_give_way()
