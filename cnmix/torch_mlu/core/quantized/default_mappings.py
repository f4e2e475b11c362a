"""Which module takes the place of which."""

from __future__ import annotations

from torch import nn

from .modules import MLUConv1d, MLUConv2d, MLUConv3d, MLULinear

DEFAULT_DYNAMIC_MODULE_MAPPING: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: MLULinear,
    nn.Conv1d: MLUConv1d,
    nn.Conv2d: MLUConv2d,
    nn.Conv3d: MLUConv3d,
}
"""By the exact class. Besides, whatever is called Conv2d becomes an MLUConv2d, as in the vendor's package."""
