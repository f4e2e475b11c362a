"""Plugins and callbacks for PyTorch Lightning as the package ``lightning``."""

from ..plugins.precision import FixedPointPrecision, FixedPointTrainerPrecision
from ..plugins.saving import AtomicSaving

try:
    from lightning.fabric.plugins import Precision as FabricPrecision
    from lightning.fabric.plugins import TorchCheckpointIO
    from lightning.pytorch.plugins.precision import Precision

    from .callbacks import CnmixMonitor, CnmixProgressBar, CnmixSummary, CnmixTelemetry
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "lightning":
        raise
    raise ModuleNotFoundError(
        'cnmix.lightning needs the package lightning: pip install "cnmix[recipes]" '
        "(for the package pytorch-lightning, import cnmix.pytorch_lightning)",
        name=error.name,
    ) from error

__all__ = [
    "AtomicCheckpointIO",
    "CnmixMonitor",
    "CnmixPlugin",
    "CnmixProgressBar",
    "CnmixSummary",
    "CnmixTelemetry",
    "FabricCnmixPlugin",
]


class FabricCnmixPlugin(FixedPointPrecision, FabricPrecision):
    """Trains in adaptive fixed point under ``lightning.fabric.Fabric(plugins=[FabricCnmixPlugin()])``.

    The arguments are those of ``cnmix.plugins.precision.FixedPointPrecision``. What the quantizers know is in
    ``state_dict()``, to save beside the model.
    """


class CnmixPlugin(FixedPointTrainerPrecision, Precision):  # type: ignore[misc]
    """Trains in adaptive fixed point under ``lightning.pytorch.Trainer(plugins=[CnmixPlugin()])``.

    The arguments are those of ``cnmix.plugins.precision.FixedPointPrecision``. The steps in an epoch come from the
    trainer unless they are given. What the quantizers know is in the checkpoint; the weights there are a plain model's.
    """


class AtomicCheckpointIO(AtomicSaving, TorchCheckpointIO):
    """Saves so that a kill leaves a whole file: ``Trainer(plugins=[CnmixPlugin(), AtomicCheckpointIO()])``."""
