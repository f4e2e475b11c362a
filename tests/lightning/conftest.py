import importlib
import io
import sys
import warnings
from types import SimpleNamespace

import pytest
import rich
import torch
from hosts import PACKAGES, Host
from rich.console import Console


@pytest.fixture(params=PACKAGES)
def host(request):
    """One of Lightning's packages, with the plugins for it."""
    return Host(request.param)


@pytest.fixture(autouse=True)
def _quiet():
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
        warnings.filterwarnings("ignore", message=".*have no `val_dataloader`.*")
        yield


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def package(request):
    """One of the two packages, with our callbacks for it."""
    ours = importlib.import_module(f"cnmix.{request.param.split('.')[0]}")
    with warnings.catch_warnings():
        for message in ("does not have many workers", "have no `val_dataloader`", "exists and is not empty"):
            warnings.filterwarnings("ignore", message=f".*{message}.*")
        yield SimpleNamespace(
            pl=importlib.import_module(request.param),
            loggers=importlib.import_module(f"{request.param}.loggers"),
            Monitor=ours.CnmixMonitor,
            ProgressBar=ours.CnmixProgressBar,
            Summary=ours.CnmixSummary,
            Telemetry=ours.CnmixTelemetry,
        )


@pytest.fixture
def console(monkeypatch, package):
    """Records what rich's own console prints, at a width that may be set."""
    recorded = Console(record=True, file=io.StringIO(), width=80)
    monkeypatch.setattr(rich, "_console", recorded)
    # The progress bar makes a new one of it otherwise.
    module = sys.modules[package.ProgressBar.__mro__[2].__module__]
    monkeypatch.setattr(module, "reconfigure", lambda **settings: None)
    return recorded
