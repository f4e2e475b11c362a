"""Train PyTorch models in adaptive fixed point on an emulated Cambricon MLU core.

``model, optimizer = cnmix.initialize(model, optimizer, opt_level="O1")``
"""

from . import core, debug, telemetry
from .accounting import executed_products
from .amp import dequantize, initialize, scale_loss
from .config import QuantizeConfig
from .core import cnmix_set_amp_quantify_params, cnmix_set_amp_use_online
from .kernels import show_config
from .overview import summary
from .rules import Rule
from .state import load_state_dict, state_dict
from .strategies import levels
from .version import __version__

__all__ = [
    "QuantizeConfig",
    "Rule",
    "__version__",
    "cnmix_set_amp_quantify_params",
    "cnmix_set_amp_use_online",
    "core",
    "debug",
    "dequantize",
    "executed_products",
    "initialize",
    "levels",
    "load_state_dict",
    "scale_loss",
    "show_config",
    "state_dict",
    "summary",
    "telemetry",
]
