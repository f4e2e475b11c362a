import warnings

import pytest
import torch
from hosts import PACKAGES, Host


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
