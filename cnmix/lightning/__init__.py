"""Precision plugins for PyTorch Lightning; needs ``pip install "cnmix[recipes]"``."""

try:
    from .callbacks import CnmixMonitor, CnmixProgressBar, CnmixSummary
    from .fabric import FabricCnmixPlugin
    from .trainer import CnmixPlugin
except ModuleNotFoundError as error:
    if error.name is None or not error.name.startswith("lightning"):
        raise
    raise ModuleNotFoundError(
        'cnmix.lightning needs Lightning: pip install "cnmix[recipes]"', name=error.name
    ) from error

__all__ = ["CnmixMonitor", "CnmixPlugin", "CnmixProgressBar", "CnmixSummary", "FabricCnmixPlugin"]
