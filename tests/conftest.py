import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Threads that wait sleep, as pytest-xdist's workers share the cores. OpenMP reads this when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
import torch.nn.functional as F
from processes import Processes
from small_net import Net
from torch import Tensor, nn

import cnmix
from cnmix.registry import Registry, registry


@pytest.fixture(autouse=True, scope="module")
def young_garbage() -> None:
    """Takes what imports made out of every later garbage collection: some tests collect hundreds of times."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def process_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gives each test a registry of its own, and puts torch's threads and random state back."""
    for name, value in vars(Registry()).items():
        monkeypatch.setattr(registry, name, value)
    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(random_state)


@pytest.fixture
def net() -> Callable[[int], Net]:
    def build(seed: int = 0) -> Net:
        torch.manual_seed(seed)
        return Net()

    return build


@pytest.fixture
def batch() -> Callable[[int], tuple[Tensor, Tensor]]:
    def draw(seed: int = 0, size: int = 8) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 + seed)
        # A few large values, so that widths have a reason to grow.
        x = torch.randn(size, 1, 6, 6, generator=generator)
        x[0, 0, 0, 0] = 100.0 + seed
        return x, torch.randint(0, 3, (size,), generator=generator)

    return draw


@pytest.fixture
def backward(batch: Callable[[int], tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """Forward and backward pass as scripts write them; returns the loss."""

    def run(model: nn.Module, optimizer: Any, seed: int = 0, factor: float = 1.0) -> Tensor:
        x, y = batch(seed)
        loss = F.cross_entropy(model(x), y) * factor
        with cnmix.scale_loss(loss, optimizer) as scaled_loss:
            scaled_loss.backward()
        return loss.detach()

    return run


@pytest.fixture
def step(backward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One training step as scripts write it; returns the loss."""

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> Tensor:
        optimizer.zero_grad()
        loss = backward(model, optimizer, seed)
        optimizer.step()
        return loss

    return run


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[Any, str, str]]:
    """Runs the command as a shell would; returns its exit code, output and error output."""
    from cnmix import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.console, "_width", 200)
    monkeypatch.setenv("COLUMNS", "400")

    def run(*arguments: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["cnmix", *map(str, arguments)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def same_weights() -> Callable[[nn.Module, nn.Module], bool]:
    def compare(a: nn.Module, b: nn.Module) -> bool:
        ours, theirs = a.state_dict(), b.state_dict()
        return list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)

    return compare


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Two processes in a group."""
    started = Processes()
    yield started
    started.stop()
