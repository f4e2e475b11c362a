"""Times the training steps of a recipe at several levels, as the vendor's model zoo times its networks."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, Sampler

from .. import amp, state
from ..closing import STRATEGY_COUNT, unwarned
from ..recipe import (
    build_model,
    build_optimizer,
    choose_levels,
    fixed_point_settings,
    load_data,
    recipe_rules,
)
from ..strategies import find_level
from ..task import batches, call, load_task
from .collector import Timer, append_average_log, append_benchmark_log
from .estimates import CARDS, estimate_steps
from .protocol import AVG_LOG, BENCHMARK_LOG, Plan, log_file

FLOAT = "fp32"
"""What the vendor calls training without cnmix, among the levels."""


@dataclass(frozen=True)
class LevelTime:
    """What the iterations of one level took.

    Attributes:
        level: "fp32", or an opt level.
        average: seconds of an iteration, data loading included; in the first of several processes.
        variance: of them, in square seconds.
        throughput: samples in a second, of all processes.
        estimates: seconds of an iteration on each of the vendor's cards, by name: ESTIMATED by
            ``cnmix.torch_mlu.cost_model``, and never measured; empty where there is no estimate.
    """

    level: str
    average: float
    variance: float
    throughput: float
    estimates: dict[str, float]


@dataclass(frozen=True)
class BenchmarkResult:
    """What a timed run came to.

    Attributes:
        levels: in the order in which they ran.
        no_estimates: why there are no estimates; "" where there are.
    """

    levels: tuple[LevelTime, ...]
    no_estimates: str = ""


def run_benchmark(
    recipe: DictConfig,
    name: str,
    plan: Plan,
    levels: Sequence[str] = (FLOAT, "O0", "O1", "O2", "O3"),
    *,
    devices: int = 1,
    report: Callable[[str], None] = lambda line: None,
) -> BenchmarkResult:
    """Times training steps of a recipe's network at several levels, each from the same weights on the same data.

    An iteration is loading a batch, forward and backward pass and the optimizer's step. The adaptive strategy closes
    after those that are not timed. There is no evaluation and no learning-rate schedule. A record for each level goes
    to the file that ``BENCHMARK_LOG`` names, a line to that of ``AVG_LOG``.

    Args:
        recipe: as ``load_recipe`` returns it; its first seed counts.
        name: of the recipe, for the logs.
        plan: how many iterations.
        levels: opt levels, and "fp32" for PyTorch without cnmix.
        devices: processes that train together (``DistributedDataParallel`` over gloo), each with batches of the
            recipe's size.
        report: called with a line when a level is done; with several processes it has to be picklable.

    Raises:
        ValueError: for an unknown level, one that stands there twice or cannot take the recipe's settings, a log that
            cannot be written, or where there is not a sample for each process.
    """
    data = _check(recipe, levels, devices)
    with tempfile.TemporaryDirectory() as folder, _variable(STRATEGY_COUNT, f"{plan.skipped}"):
        plain: Any = OmegaConf.to_container(recipe)  # which another process can take
        job = _Job(plain, tuple(levels), plan, devices, folder, report)
        if devices == 1:
            job(0, data)
        else:
            multiprocessing.spawn(job, nprocs=devices)
        report("estimating what a step takes on the cards")
        estimates, reason = estimate_steps(plain, levels, Path(folder))
        found = []
        for level in levels:
            average, variance = torch.load(Path(folder) / f"{level}.time.pt")
            throughput = recipe.batch_size * devices / average
            found.append(LevelTime(level, average, variance, throughput, estimates.get(level, {})))
        for each in found:
            _log(each, name, recipe.batch_size, devices)
    return BenchmarkResult(tuple(found), reason)


def notes(cards: Sequence[str] = CARDS) -> list[str]:
    """Returns what is assumed of these cards."""
    from ..torch_mlu.cards import find_card

    return [note for card in cards if (note := find_card(card).note)]


@dataclass(frozen=True)
class _Job:
    """What each process does; a class, so that another process can take it."""

    recipe: dict[str, Any]
    levels: tuple[str, ...]
    plan: Plan
    devices: int
    folder: str
    report: Callable[[str], None]

    def __call__(self, rank: int, data: Dataset[Any] | None = None) -> None:
        recipe = OmegaConf.create(self.recipe)
        threads = torch.get_num_threads()
        torch.set_num_threads(recipe.threads or max(1, threads // self.devices))
        if self.devices > 1:
            place = f"file://{self.folder}/processes"
            dist.init_process_group("gloo", init_method=place, rank=rank, world_size=self.devices)
        try:
            data = load_data(recipe)[0] if data is None else data
            for level in self.levels:
                timer, model = time_level(recipe, level, data, self.plan, rank, self.devices)
                if rank == 0:
                    self._keep(level, timer, model)
                del timer, model  # before the next one is built
        finally:
            torch.set_num_threads(threads)
            if self.devices > 1:
                dist.destroy_process_group()

    def _keep(self, level: str, timer: Timer, model: nn.Module) -> None:
        known = state.state_dict(model) if level != FLOAT else None
        torch.save({"weights": model.state_dict(), "cnmix": known}, Path(self.folder) / f"{level}.pt")
        torch.save((timer.average, timer.variance), Path(self.folder) / f"{level}.time.pt")
        self.report(f"  {level}: {timer.average:.4g} s for each of {len(timer.seconds)} iterations")


def time_level(
    recipe: DictConfig, level: str, data: Dataset[Any], plan: Plan, rank: int = 0, devices: int = 1
) -> tuple[Timer, nn.Module]:
    """Trains a recipe's network for the iterations of a plan, and times those after the ones that it skips.

    Args:
        recipe: as ``load_recipe`` returns it.
        level: an opt level, or "fp32".
        data: the training data.
        plan: how many iterations.
        rank: of this process.
        devices: how many processes there are; where there are several, in a process group.

    Returns:
        The times, and the network.
    """
    seed = recipe.seeds[0]
    torch.manual_seed(seed)
    model, optimizer = prepare(recipe, level, data, devices)
    network: nn.Module = DistributedDataParallel(model) if devices > 1 else model
    task = load_task(recipe)
    order = _Endless(len(data), seed, rank, devices)  # type: ignore[arg-type]
    loaded = iter(batches(data, recipe.batch_size, sampler=order, workers=recipe.workers, seed=seed))
    network.train()
    timer = Timer(plan.skipped)
    timer.place()
    for _ in range(plan.total):
        inputs, targets = next(loaded)
        train_step(network, optimizer, task.loss, inputs, targets, level)
        timer.record()
        timer.place()
    return timer, model


def prepare(recipe: DictConfig, level: str, data: Dataset[Any], devices: int = 1) -> tuple[nn.Module, Any]:
    """Builds a recipe's network and optimizer, and initializes them at a level."""
    model = build_model(recipe)
    optimizer, _ = build_optimizer(recipe, model.parameters())
    if level == FLOAT:
        return model, optimizer
    settings: dict[str, Any] = {}
    if find_level(level).quantizes:  # O0 has no use for the recipe's
        steps = math.ceil(len(data) / (recipe.batch_size * devices))  # type: ignore[arg-type]
        settings = {"steps_per_epoch": steps, **fixed_point_settings(recipe)}
        settings |= {"rules": recipe_rules(recipe), "activation_dtype": recipe.cnmix.activation_dtype}
    with unwarned():
        amp.initialize(model, optimizer, level, **settings)
    return model, optimizer


def train_step(
    network: nn.Module, optimizer: Any, loss: Callable[[Any, Any], torch.Tensor], inputs: Any, targets: Any, level: str
) -> None:
    """Takes a training step on a batch, as a script does at this level."""
    optimizer.zero_grad()
    value = loss(call(network, inputs), targets)
    if level == FLOAT:
        value.backward()
    else:
        with amp.scale_loss(value, optimizer) as scaled:
            scaled.backward()
    optimizer.step()


class _Endless(Sampler[int]):
    """The samples of a process in random order, epoch after epoch, so that every batch is full."""

    def __init__(self, size: int, seed: int, rank: int, devices: int) -> None:
        self._size, self._seed, self._rank, self._devices = size, seed, rank, devices

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            yield from torch.randperm(self._size, generator=generator)[self._rank :: self._devices].tolist()


def _check(recipe: DictConfig, levels: Sequence[str], devices: int) -> Dataset[Any]:
    """Refuses before anything runs what would fail later; returns the training data."""
    if len(set(levels)) < len(levels) or not levels:
        raise ValueError(f"name each level once, as --levels {FLOAT},O0,O1, got {','.join(levels) or 'none'}")
    opt_levels = [level for level in levels if level != FLOAT]
    choose_levels(recipe, False, opt_levels)
    for name in (BENCHMARK_LOG, AVG_LOG):
        log_file(name)
    if not 1 <= devices <= 64:
        raise ValueError(f"there can be 1 to 64 devices, got {devices}")
    model = build_model(recipe)
    build_optimizer(recipe, model.parameters())
    for level in map(find_level, opt_levels):
        if level.quantizes:
            level.check(model, level.configure(fixed_point_settings(recipe)), recipe_rules(recipe))
    data = load_data(recipe)[0]
    samples = len(data)  # type: ignore[arg-type]
    if samples < devices:
        raise ValueError(f"{devices} devices need a sample each, and the training data has {samples}")
    return data


def _log(time: LevelTime, name: str, batch_size: int, devices: int) -> None:
    metrics = {
        "net": name,
        "batch_size": batch_size,
        "cards": devices,
        "precision": time.level,
        "DPF_mode": "single" if devices == 1 else "ddp ",
        "batch_time_avg": round(time.average, 3),
        "batch_time_var": round(time.variance, 6),
        "throughput": round(time.throughput, 2),
    }
    if path := log_file(BENCHMARK_LOG):
        append_benchmark_log(path, metrics)
    if path := log_file(AVG_LOG):
        append_average_log(path, metrics)


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Sets a variable of the environment, for the processes that are started too."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
