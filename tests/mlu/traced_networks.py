"""Networks for the tests of traced modules."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnmix.torch_mlu.core.mlu_quantize as mlu_quantize


class Residual(nn.Module):
    """Residual sums, a detour, several kinds of padding and activation, sizes that are computed."""

    def __init__(self, norms: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8) if norms else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.first = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", bias=False)
        self.second = nn.Conv2d(8, 8, 2, padding="same", groups=2)
        self.wide = nn.Conv2d(16, 6, 1)
        self.head = nn.Linear(6 * 16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.relu(self.norm(self.stem(x)))
        y = self.relu(self.first(x))
        y = self.second(y)
        y += x
        y = F.leaky_relu(y + 1, 0.1)
        small = F.interpolate(F.max_pool2d(y, 2), scale_factor=2.0)
        y = F.adaptive_avg_pool2d(self.wide(torch.cat([y, small], 1)), 4)
        return self.head(y.view(y.size(0), -1)), y.mean((2, 3))


class Branching(nn.Module):
    """Returns the greatest elements, which the fused backend does not find, and a network behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(8, 8), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        values, indices = self.before(x).relu().topk(3)
        return {"indices": indices, "scores": self.after(values)}


def images(*shape: int) -> Tensor:
    return torch.rand(shape or (2, 3, 16, 16), generator=torch.Generator().manual_seed(7))


def made(norms: bool = False) -> Residual:
    torch.manual_seed(1)
    model = Residual(norms)
    if norms:
        model.train()(images())
    return model.eval()


def quantized(model: nn.Module, x: Tensor, dtype: str, qconfig: dict[str, Any] | None = None) -> nn.Module:
    generated = mlu_quantize.quantize_dynamic_mlu(model, qconfig, dtype=dtype, gen_quant=True)
    generated(x)
    result = mlu_quantize.quantize_dynamic_mlu(model, qconfig)
    result.load_state_dict(generated.state_dict())
    return result
