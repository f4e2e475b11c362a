"""The old typed tensors: ``torch.mlu.FloatTensor(2, 3)``, ``x.type(torch.mlu.HalfTensor)``, ``isinstance``."""

from __future__ import annotations

from typing import Any

import torch


class _TypedTensor(type):
    """Makes a class that makes tensors of a dtype on the current card."""

    dtype: torch.dtype

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, torch.Tensor) and instance.device.type == "mlu" and instance.dtype == cls.dtype

    def __call__(cls, *args: Any, **kwargs: Any) -> torch.Tensor:
        host: Any = getattr(torch, cls.__qualname__)
        made: torch.Tensor = host(*args, **kwargs)
        return made.to("mlu")


def _make(name: str, dtype: torch.dtype) -> type:
    # Tensor.type takes a class by this name, which it wants in full.
    of = {"dtype": dtype, "is_sparse": False, "__module__": "torch.mlu", "__qualname__": name}
    return _TypedTensor(f"torch.mlu.{name}", (), {**of, "__doc__": f"Makes {dtype} tensors on the card."})


FloatTensor = _make("FloatTensor", torch.float32)
DoubleTensor = _make("DoubleTensor", torch.float64)
HalfTensor = _make("HalfTensor", torch.float16)
BFloat16Tensor = _make("BFloat16Tensor", torch.bfloat16)
ByteTensor = _make("ByteTensor", torch.uint8)
CharTensor = _make("CharTensor", torch.int8)
ShortTensor = _make("ShortTensor", torch.int16)
IntTensor = _make("IntTensor", torch.int32)
LongTensor = _make("LongTensor", torch.int64)
BoolTensor = _make("BoolTensor", torch.bool)
