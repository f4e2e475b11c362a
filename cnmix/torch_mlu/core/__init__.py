"""What the vendor's package has under ``torch_mlu.core``."""

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    # Scripts import torch_mlu and write torch_mlu.core.mlu_model.
    if name in ("amp", "device", "dumptool", "mlu_model", "mlu_quantize", "quantized"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module 'torch_mlu.core' has no attribute {name!r}")
