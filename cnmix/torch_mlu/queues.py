"""Tensors of the cards on the way to another process: as copies."""

from __future__ import annotations

import io
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import reduce_tensor


def register_queues() -> None:
    """Lets queues, pipes and arguments of ``torch.multiprocessing`` carry the card's tensors.

    PyTorch shares the memory of those of the host and of CUDA alone. For others it fails in a thread of the queue, so
    that the process that waits for the tensor hangs.
    """
    for kind in (Tensor, nn.Parameter):
        ForkingPickler.register(kind, _reduce)


def _reduce(x: Tensor) -> Any:
    if x.device.type != "mlu":
        return reduce_tensor(x)
    if x.requires_grad and not x.is_leaf:
        raise RuntimeError("a tensor that autograd computed cannot go to another process: send x.detach()")
    content = io.BytesIO()  # bytes: a tensor of the host would be shared memory, which has to outlive the pickling
    torch.save(x.detach().cpu(), content)
    return _rebuild, (content.getvalue(), str(x.device), x.requires_grad, isinstance(x, nn.Parameter))


def _rebuild(content: bytes, device: str, requires_grad: bool, is_parameter: bool) -> Tensor:
    x = torch.load(io.BytesIO(content), weights_only=True).to(device)
    return nn.Parameter(x, requires_grad) if is_parameter else x.requires_grad_(requires_grad)
