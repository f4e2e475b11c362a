"""A small network, a batch for it, and what the card runs in a training step of theirs."""

import torch
from torch import Tensor, nn

OPERATORS = [
    *("convolution_overrideable", "add_", "native_batch_norm", "relu", "max_pool2d_with_indices", "addmm"),
    *("log_softmax", "nll_loss_forward", "fill_", "nll_loss_backward", "log_softmax_backward_data"),
    *("mm", "mm", "sum"),
    *("max_pool2d_with_indices_backward", "threshold_backward", "native_batch_norm_backward"),
    *("convolution_backward_overrideable", *["add_"] * 6),
]
"""Those that compute, with cross entropy and SGD, by name and in order."""


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)
    )


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([1, 2])
