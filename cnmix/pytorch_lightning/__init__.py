"""Callbacks for the package ``pytorch_lightning``; needs ``pip install "cnmix[recipes]"``."""

try:
    from .callbacks import CnmixMonitor, CnmixProgressBar, CnmixSummary
except ModuleNotFoundError as error:
    if error.name is None or not error.name.startswith("pytorch_lightning"):
        raise
    raise ModuleNotFoundError(
        'cnmix.pytorch_lightning needs pytorch_lightning: pip install "cnmix[recipes]"', name=error.name
    ) from error

__all__ = ["CnmixMonitor", "CnmixProgressBar", "CnmixSummary"]
