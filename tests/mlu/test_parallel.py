"""Several cards in one process, and batch norms over several processes."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn


def gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad.cpu() for parameter in module.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("devices", [None, [0], ["mlu:0"], [0, 1]])
@pytest.mark.parametrize("where", ["cpu", "mlu"])
def test_data_parallel(devices: list[Any] | None, where: str) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    model = nn.DataParallel(copy.deepcopy(plain).to("mlu"), device_ids=devices)
    x = torch.randn(6, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as of a PyTorch without NCCL
        y = model(x.to(where))
        y.square().sum().backward()
    assert str(y.device) == "mlu:0"
    expected = plain(x)
    expected.square().sum().backward()
    torch.testing.assert_close(y.detach().cpu(), expected.detach())
    torch.testing.assert_close(gradients(model), gradients(plain))
    with torch.no_grad():
        torch.testing.assert_close(model(x.to(where)).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norms_over_parts_are_those_over_the_whole(dtype: torch.dtype, affine: bool) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3, affine=affine).to("mlu")
    weight = bias = None
    if affine:
        weight, bias = nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = torch.randn(5, 3, 4, 2, device="mlu").to(dtype).float().requires_grad_()
    gradient = torch.randn_like(x).to(dtype).float()
    norm(x).backward(gradient)

    parts, gradients = x.detach().to(dtype).split([2, 3]), gradient.to(dtype).split([2, 3])
    statistics = [torch.batch_norm_stats(part, norm.eps) for part in parts]
    means, deviations = (torch.stack(each) for each in zip(*statistics, strict=True))
    assert means.dtype == torch.float32
    counts = torch.tensor([16, 24], device="mlu")
    running = torch.zeros(3, device="mlu"), torch.ones(3, device="mlu")
    mean, deviation = torch.batch_norm_gather_stats_with_counts(
        parts[0], means, deviations, *running, 0.1, norm.eps, counts.float()
    )
    torch.testing.assert_close(running, (norm.running_mean, norm.running_var))

    y = [torch.batch_norm_elemt(part, weight, bias, mean, deviation, norm.eps) for part in parts]
    assert y[0].dtype == dtype
    torch.testing.assert_close(torch.cat(y).float(), norm(x), rtol=0.01, atol=0.02)
    reduced = [
        torch.batch_norm_backward_reduce(dy, part, mean, deviation, weight, True, affine, affine)
        for dy, part in zip(gradients, parts, strict=True)
    ]
    sums, products, of_weight, of_bias = (torch.stack(each).sum(0) for each in zip(*reduced, strict=True))
    grads = [
        torch.batch_norm_backward_elemt(dy, part, mean, deviation, weight, sums, products, counts.int())
        for dy, part in zip(gradients, parts, strict=True)
    ]
    assert grads[0].dtype == dtype
    torch.testing.assert_close(torch.cat(grads).float(), x.grad, rtol=0.01, atol=0.02)
    if affine:
        torch.testing.assert_close((of_weight, of_bias), (norm.weight.grad, norm.bias.grad))
