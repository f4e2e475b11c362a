"""Trains and evaluates recipes, on Lightning's loop."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from . import checkpoint
from .closing import STRATEGY_COUNT, strategy_count, unwarned
from .config import OperandConfigs
from .evaluation import LAST_FILE, MODEL_FILE, check_weights_fit, evaluate, evaluation_batches, read_checkpoint
from .lightning import AtomicCheckpointIO, CnmixPlugin, CnmixProgressBar, CnmixTelemetry
from .nn.callers import is_caller
from .nn.module_state import check_widths
from .recipe import (
    build_model,
    build_optimizer,
    choose_levels,
    fixed_point_settings,
    load_data,
    recipe_rules,
    telemetry_rules,
)
from .rules import RuleBook
from .state import check_names_fit
from .strategies import find_level
from .task import arguments, batches, call, load_task


@dataclass
class RunResult:
    """What one training run came to.

    Attributes:
        level: opt level.
        seed: seed of the weights, the order of the data and dropout.
        test_accuracy: share of the test data that is right at the end by the recipe's score, of its classes by default,
            in [0, 1]; None where the adaptive strategy closed early.
        test_loss: mean loss on the test data at the end, by default the cross entropy of the classes in nats; None
            where it is not finite, or the adaptive strategy closed early.
        seconds: wall time of training, evaluation after each epoch included.
        folder: where its metrics and checkpoints are.
        strategy_count: training iterations after which ``MLU_ADAPTIVE_STRATEGY_COUNT`` closed the adaptive strategy, in
            a run that was not evaluated; 0 in any other.
    """

    level: str
    seed: int
    test_accuracy: float | None
    test_loss: float | None
    seconds: float
    folder: str
    strategy_count: int = 0


class Training(pl.LightningModule):
    """Trains a recipe's network.

    Args:
        model: the network.
        recipe: loss, score, optimizer and schedule come from here.
        level: opt level of this run, kept in the checkpoint.
        seed: likewise.
    """

    def __init__(self, model: nn.Module, recipe: DictConfig, level: str, seed: int) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.task = load_task(recipe)
        self._random_state: Tensor | None = None
        self.save_hyperparameters({"recipe": OmegaConf.to_container(recipe), "level": level, "seed": seed})

    def training_step(self, batch: tuple[Any, Any], batch_idx: int) -> Tensor:
        """Returns the loss of a batch."""
        inputs, targets = batch
        loss = self.task.loss(call(self.model, inputs), targets)
        samples = len(arguments(inputs)[0])
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=samples)
        return loss

    def validation_step(self, batch: tuple[Any, Any], batch_idx: int) -> None:
        """Logs loss and accuracy on the test data."""
        inputs, targets = batch
        outputs = call(self.model, inputs)
        right, count = self.task.score(outputs, targets)
        values: dict[str, Any] = {"test_loss": self.task.loss(outputs, targets), "test_accuracy": right / max(count, 1)}
        self.log_dict(values, prog_bar=True, batch_size=count)

    def configure_optimizers(self) -> Any:
        """Builds what the recipe names."""
        optimizer, scheduler = build_optimizer(self.recipe, self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": scheduler} if scheduler is not None else optimizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the random state, so that a resumed run draws the same dropout as an uninterrupted one."""
        checkpoint["random_state"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the random state back, to be set when training starts."""
        self._random_state = checkpoint.get("random_state")

    def on_train_start(self) -> None:
        """Sets the random state of a resumed run."""
        if self._random_state is not None:
            torch.set_rng_state(self._random_state.cpu())
            self._random_state = None


def run_recipe(
    recipe: DictConfig,
    name: str,
    *,
    compare: bool = False,
    levels: Sequence[str] = (),
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[Path, list[RunResult], nn.Module]:
    """Trains a recipe once for each seed, with ``compare`` or ``levels`` at several levels from the same seeds.

    Leaves ``<output>/<name>/<time>/`` with the resolved recipe, the results, and for each run its metrics, Lightning's
    checkpoint to resume from and the model's.

    Args:
        recipe: as ``load_recipe`` returns it.
        name: of the recipe.
        compare: also train at O0, the float32 baseline.
        levels: opt levels to train at in place of the recipe's own, in this order; its settings hold at each.
        resume: a checkpoint ``last.ckpt`` to go on from; for recipes with one seed.
        progress: whether to draw a progress bar.
        report: called with a line when a run starts, ends or is interrupted.

    Returns:
        The folder, the result of each run, and the last model.

    Raises:
        ValueError: if a level is unknown or cannot take the recipe's settings, if ``levels`` is given with ``compare``
            or ``resume``, or if ``resume`` is given with several runs or is no checkpoint; for a bad value of
            ``MLU_ADAPTIVE_STRATEGY_COUNT``.
    """
    # What the recipe or the checkpoint has wrong is refused before a folder is made.
    count, chosen = strategy_count(), choose_levels(recipe, compare, levels)
    model = build_model(recipe)
    build_optimizer(recipe, model.parameters())
    load_task(recipe)
    modules = [_modules_to_convert(recipe, model, level) for level in chosen]
    for rule in telemetry_rules(recipe):
        RuleBook(model, ()).check_names_of(rule)
    done = 0
    if resume is not None:
        if levels or len(chosen) * len(recipe.seeds) > 1:
            raise ValueError("--resume goes on with one run: give one seed (seeds=[0]) and no --compare or --levels")
        done = _check_resumable(Path(resume), model, modules[0], chosen[0], recipe.epochs)
    data = load_data(recipe)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    folder = _new_folder(Path(recipe.output) / name)
    OmegaConf.save(recipe, folder / "recipe.yaml")
    if count:
        iterations = (recipe.epochs - done) * math.ceil(len(data[0]) / recipe.batch_size)  # type: ignore[arg-type]
        closes = f": the adaptive strategy closes after {count} iterations"
        if count >= iterations:
            closes = f" is beyond the {iterations} iterations of a run: the adaptive strategy does not close"
        report(f"{STRATEGY_COUNT}={count}{closes}; there is no evaluation, and the accuracy is not valid")
    results: list[RunResult] = []
    runs = [(seed, level) for seed in recipe.seeds for level in chosen]
    for number, (seed, level) in enumerate(runs, start=1):
        place = folder / f"{level}-seed{seed}"
        report(f"run {number} of {len(runs)}: {level}, seed {seed}, {recipe.epochs} epochs")
        try:
            result, model = train(recipe, level, seed, data, place, resume=resume, progress=progress)
        except KeyboardInterrupt:
            last = place / LAST_FILE
            further = f"; go on with --resume {last} seeds=[{seed}] cnmix.opt_level={level}" if last.is_file() else ""
            report(f"interrupted: kept in {folder}{further}")
            raise
        if result.test_accuracy is None:
            report(f"  {result.seconds:.1f} s, test accuracy not valid")
        else:
            loss = "not finite: training diverged" if result.test_loss is None else f"{result.test_loss:.4f}"
            report(f"  {result.seconds:.1f} s, test accuracy {result.test_accuracy:.2%}, test loss {loss}")
        results.append(result)
        (folder / "results.json").write_text(json.dumps([asdict(each) for each in results], indent=2) + "\n")
    return folder, results, model


def train(
    recipe: DictConfig,
    level: str,
    seed: int,
    data: tuple[Dataset[Any], Dataset[Any]],
    folder: Path,
    *,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
    callbacks: tuple[Callback, ...] = (),
) -> tuple[RunResult, nn.Module]:
    """Trains the recipe's model once; returns the result and the trained model."""
    count = strategy_count()
    torch.manual_seed(seed)
    training = Training(build_model(recipe), recipe, level, seed)
    # The recipe names modules of the network, which is `model` in there.
    rules = [rule.under("model.") for rule in recipe_rules(recipe)]
    if find_level(level).quantizes:
        plugin = CnmixPlugin(
            level,
            rules=rules,
            activation_dtype=recipe.cnmix.activation_dtype,
            settings=fixed_point_settings(recipe),
        )
    else:  # the baseline, which the recipe's settings are not for
        plugin = CnmixPlugin(level)
    shuffled = DistributedSampler(data[0], num_replicas=1, rank=0, shuffle=True, seed=seed)  # type: ignore[var-annotated]
    loader = batches(data[0], recipe.batch_size, sampler=shuffled, workers=recipe.workers, seed=seed)
    test_loader = evaluation_batches(recipe, data[1])
    keep_last = ModelCheckpoint(folder, filename="last", every_n_epochs=1, enable_version_counter=False)
    bar = [CnmixProgressBar()] if progress else []
    recorded = telemetry_rules(recipe)
    recorders = [CnmixTelemetry(recipe.telemetry.every_n_steps, recorded, folder, "model")] if recorded else []
    started = time.perf_counter()
    with _quiet_lightning(), unwarned():
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=recipe.epochs,
            plugins=[plugin, AtomicCheckpointIO()],  # last.ckpt is saved over itself
            callbacks=[keep_last, *recorders, *bar, *callbacks],
            logger=CSVLogger(folder, name="", version=""),
            num_sanity_val_steps=0,
            limit_val_batches=0 if count else None,
            enable_progress_bar=progress,
            enable_model_summary=False,
            log_every_n_steps=1,
        )
        options: dict[str, Any] = {} if resume is None else {"ckpt_path": str(resume)}
        if resume is not None and "weights_only" in inspect.signature(trainer.fit).parameters:  # Lightning 2.6
            options["weights_only"] = True
        try:
            trainer.fit(training, loader, test_loader, **options)
        except SystemExit:  # what Lightning makes of an interrupt
            raise KeyboardInterrupt from None
    seconds = time.perf_counter() - started
    result = RunResult(level, seed, None, None, seconds, str(folder), count)
    if not count:
        result.test_accuracy, loss = evaluate(training.model, test_loader, training.task)
        result.test_loss = loss if math.isfinite(loss) else None
    details = {"recipe": OmegaConf.to_container(recipe), "result": asdict(result)}
    checkpoint.save(folder / MODEL_FILE, training.model, **details)
    return result, training.model


def _modules_to_convert(recipe: DictConfig, model: nn.Module, name: str) -> Mapping[str, OperandConfigs]:
    """Returns what training at this level computes in fixed point, with its settings; raises where it could not."""
    level = find_level(name)
    if not level.quantizes:  # the baseline, which the recipe's settings are not for
        return {}
    return level.check(model, level.configure(fixed_point_settings(recipe)), recipe_rules(recipe))


def _check_resumable(
    file: Path, model: nn.Module, modules: Mapping[str, OperandConfigs], level: str, epochs: int
) -> int:
    """Returns the epochs that a checkpoint has trained; refuses one of another network or level, or that is done."""
    saved = read_checkpoint(file)
    if saved.get("epoch") is None:
        raise ValueError(f"{file} is no checkpoint to go on from: give the last.ckpt of a run")
    check_weights_fit(model, saved["state_dict"], file)
    before = saved["result"].get("level", level)
    if before != level:
        raise ValueError(f"{file} was trained at {before} and not {level}: go on with cnmix.opt_level={before}")
    states = saved["cnmix"]["models"] or [{"modules": {}}]
    calling = {fqn for fqn, module in model.named_modules() if is_caller(module)}
    check_names_fit(type(model).__name__, set(modules), states[0], calling)
    for fqn, configs in modules.items():
        check_widths(states[0]["modules"][fqn], fqn, configs)
    done = int(saved["epoch"]) + 1
    if done >= epochs:
        raise ValueError(f"{file} has trained {done} epochs already: give more with epochs=")
    return done


def _new_folder(parent: Path) -> Path:
    """Makes a folder called by the time, with a number behind it where one is there already."""
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    for number in range(1, 1000):
        folder = parent / (stamp if number == 1 else f"{stamp}_{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise FileExistsError(f"{parent} has a thousand runs of this second")


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silences what Lightning says of devices that are not used, and of loaders without worker processes."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
            warnings.filterwarnings("ignore", message="The dirpath has changed from .*")
            warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
