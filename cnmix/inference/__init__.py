"""Integer inference from a training checkpoint: operator by operator, fused, and from a file without the model's code.

No calibration pass: what the quantizers learned is all that is needed.
"""

from .freezing import freeze, prepare
from .fused import FusedModel, fuse
from .integers import load
from .onnx import to_onnx
from .vendor import vendor_state_dict

__all__ = ["FusedModel", "freeze", "fuse", "load", "prepare", "to_onnx", "vendor_state_dict"]
