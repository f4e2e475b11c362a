"""Plugins and callbacks for PyTorch Lightning as the package ``pytorch_lightning``."""

from ..plugins.precision import FixedPointPrecision, FixedPointTrainerPrecision
from ..plugins.saving import AtomicSaving

try:
    from lightning_fabric.plugins import Precision as FabricPrecision
    from lightning_fabric.plugins import TorchCheckpointIO
    from pytorch_lightning.plugins.precision import Precision

    from .callbacks import CnmixMonitor, CnmixProgressBar, CnmixSummary, CnmixTelemetry
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] not in ("pytorch_lightning", "lightning_fabric"):
        raise
    raise ModuleNotFoundError(
        'cnmix.pytorch_lightning needs the package pytorch-lightning: pip install "cnmix[recipes]" '
        "(for the package lightning, import cnmix.lightning)",
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
    """Trains in adaptive fixed point under ``lightning_fabric.Fabric(plugins=[FabricCnmixPlugin()])``.

    The arguments are those of ``cnmix.plugins.precision.FixedPointPrecision``. What the quantizers know is in
    ``state_dict()``, to save beside the model.
    """


class CnmixPlugin(FixedPointTrainerPrecision, Precision):  # type: ignore[misc]
    """Trains in adaptive fixed point under ``pytorch_lightning.Trainer(plugins=[CnmixPlugin()])``.

    The arguments are those of ``cnmix.plugins.precision.FixedPointPrecision``. The steps in an epoch come from the
    trainer unless they are given. What the quantizers know is in the checkpoint; the weights there are a plain model's.
    """


class AtomicCheckpointIO(AtomicSaving, TorchCheckpointIO):
    """Saves so that a kill leaves a whole file: ``Trainer(plugins=[CnmixPlugin(), AtomicCheckpointIO()])``."""
