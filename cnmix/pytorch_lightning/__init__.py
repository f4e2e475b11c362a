"""Callbacks for the package ``pytorch_lightning``; needs ``pip install "cnmix[recipes]"``."""

from .callbacks import CnmixMonitor, CnmixProgressBar, CnmixSummary

__all__ = ["CnmixMonitor", "CnmixProgressBar", "CnmixSummary"]
