"""The vendor's package ``torch_mlu``, emulated: scripts that ask for an MLU run where there is none.

``cnmix run SCRIPT`` runs one with it in place; from code, ``cnmix.torch_mlu.install()`` does, before anything imports
``torch_mlu``. Importing this module changes nothing.
"""

import importlib
from types import ModuleType

from ..version import __version__
from .installation import install, is_installed

__all__ = ["__version__", "install", "is_installed"]


def __getattr__(name: str) -> ModuleType:
    # Scripts import torch_mlu and write torch_mlu.core.mlu_model.
    if name in ("_MLUC", "backends", "core"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module 'torch_mlu' has no attribute {name!r}")
