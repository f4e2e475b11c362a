"""What the precision plugins do: mix-in classes over the Precision classes of Fabric and of the Trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import math
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from .. import state
from ..amp import initialize
from ..checkpoint import find_state
from ..config import QuantizeConfig, check_names
from ..nn import quantizer_sets, set_steps_per_epoch
from ..nn.half import frame
from ..nn.ranks import resting_parameters
from ..registry import unwrap
from ..rules import Rule, RuleBook, leave_out, parse_rules
from ..strategies import find_level
from .loss_scale import PluginScale

logger = logging.getLogger("cnmix")

# Lightning's two packages are copies, and none takes a plugin of the other.
_IMPORTS = {
    "lightning.pytorch.Trainer": "from cnmix.lightning import CnmixPlugin",
    "lightning.fabric.Fabric": "from cnmix.lightning import FabricCnmixPlugin",
    "pytorch_lightning.Trainer": "from cnmix.pytorch_lightning import CnmixPlugin",
    "lightning_fabric.Fabric": "from cnmix.pytorch_lightning import FabricCnmixPlugin",
}


class _Explained(type):
    """Lightning prints what it is given and cannot take: of a class, that says what to write instead."""

    def __str__(cls) -> str:
        return f"the class {cls.__name__} (write {cls.__name__}(), an instance)"

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Makes a plugin; refuses an argument that there is not, with what to write instead."""
        names = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]  # type: ignore[misc]
        for name in kwargs:
            if name in {field.name for field in dataclasses.fields(QuantizeConfig)}.difference(names):
                raise TypeError(f"{cls.__name__} takes {name} among its settings: settings={{{name!r}: ...}}")
        try:
            check_names(kwargs, names, f"argument of {cls.__name__}:")
        except ValueError as error:
            raise TypeError(str(error)) from None
        return super().__call__(*args, **kwargs)


class FixedPointPrecision(metaclass=_Explained):
    """Trains in adaptive fixed point: what the plugin for Fabric adds to Fabric's ``Precision``.

    What is given as an argument goes over the recipe's entry of the same name.

    Args:
        opt_level: "O0" to "O3", see ``cnmix.initialize``. Default: the recipe's, or "O1".
        bitwidth: width that operands start with: 8, 16 or 31.
        max_bitwidth: width that none exceeds: 8, 16 or 31.
        steps_per_epoch: training steps in an epoch. The Trainer's plugin takes it from the trainer where it is None.
        exclude: fully qualified names of modules to leave in float32.
        rules: other settings for some modules or operands, see ``cnmix.initialize``.
        activation_dtype: what flows between products: "float32", "bfloat16" or "float16". Default: the level's.
        loss_scale: a factor, or "dynamic". Default: "dynamic" where activations are float16, else 1.
        settings: further fields of ``cnmix.QuantizeConfig``.
        recipe: a recipe's file, or a mapping, whose section ``cnmix`` has any of the above but the loss scale. At a
            level that computes in float32, given by ``opt_level``, the recipe's settings have no use.

    Raises:
        FileNotFoundError: if there is no such recipe.
        TypeError: if ``exclude`` or ``rules`` is no list.
        ValueError: for an unknown level or setting, or a value out of its range.
    """

    def __init__(
        self,
        opt_level: str | None = None,
        bitwidth: int | None = None,
        max_bitwidth: int | None = None,
        steps_per_epoch: int | None = None,
        exclude: Sequence[str] | None = None,
        rules: Sequence[Mapping[str, Any] | Rule] | None = None,
        activation_dtype: str | None = None,
        loss_scale: float | str | None = None,
        settings: dict[str, Any] | None = None,
        recipe: str | dict[str, Any] | None = None,
    ) -> None:
        section = {} if recipe is None else _load_section(recipe)
        if opt_level is not None and not find_level(opt_level).quantizes:
            section = {}  # the baseline, which a recipe's settings are not for
        recipe_level = section.pop("opt_level", "O1")
        self.opt_level = recipe_level if opt_level is None else opt_level
        excluded, recipe_rules = section.pop("exclude", ()), section.pop("rules", ())
        recipe_dtype = section.pop("activation_dtype", None)
        given = {"bitwidth": bitwidth, "max_bitwidth": max_bitwidth, "steps_per_epoch": steps_per_epoch}
        twice = [name for name, value in given.items() if value is not None and name in (settings or {})]
        if twice:
            raise ValueError(f"{twice[0]} is given by itself and in settings: give it once")
        given.update(settings or {})
        self.settings = {**section, **{name: value for name, value in given.items() if value is not None}}
        self.rules = (
            *leave_out(excluded if exclude is None else exclude),
            *parse_rules(recipe_rules if rules is None else rules),
        )
        self.activation_dtype = recipe_dtype if activation_dtype is None else activation_dtype
        self.loss_scale = loss_scale
        # Refuse bad settings where the plugin is written, not when training starts.
        level = find_level(self.opt_level)
        level.configure(self.settings)
        level.check_rules(self.rules)
        self._activations = level.choose_activations(self.activation_dtype)
        self._scale = PluginScale(level.choose_loss_scale(loss_scale, self._activations))
        if self._scale.needed:
            # Where this method is overridden, Fabric makes users call fabric.backward: only where they have to.
            self.backward = self._backward_scaled
        self._modules: list[weakref.ref[Module]] = []
        self._waiting: list[dict[str, Any]] = []
        self._steps: int | None = None

    def __repr__(self) -> str:
        shown: dict[str, Any] = {"opt_level": self.opt_level, **self.settings}
        for name in ("rules", "activation_dtype", "loss_scale"):
            if getattr(self, name) not in (None, ()):
                shown[name] = getattr(self, name)
        written = f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"
        own = _import_line(type(self))
        return "".join([written, *(f" for {host}(plugins=...)" for host, line in _IMPORTS.items() if line == own)])

    def __str__(self) -> str:
        own = _import_line(type(self))
        others = "; ".join(f"for {host}: {line}" for host, line in _IMPORTS.items() if line != own)
        return f"{self!r}, without precision=, and for FSDP with ModelParallelStrategy in place of 'fsdp' ({others})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_modules": []}  # a copy converts modules of its own

    def convert_module(self, module: Module) -> Module:
        """Converts a model in place; Lightning calls this at the start of every fit, validate, test and predict."""
        settings: dict[str, Any] = dict(self.settings)
        initialize(module, None, self.opt_level, rules=self.rules, activation_dtype=self.activation_dtype, **settings)
        if self._activations != torch.float32 and callable(getattr(module, "training_step", None)):
            # A LightningModule computes its loss outside of forward, from what its parts return.
            for part in module.children():
                frame(part, self._activations)
        if not any(known is module for known in self._live_modules()):
            if self._waiting:
                self._check_module(module, self._waiting[0])
                self._load_module(module, self._waiting.pop(0))
            self._modules.append(weakref.ref(module))
        if self._steps is not None:
            self._tell_steps(module, self._steps)
        return module

    def _backward_scaled(self, tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        """Performs the backward pass of the scaled loss; behind it gradients are ordinary ones."""
        with self._scale.scale(tensor, self._parameters()) as scaled:
            super().backward(scaled, *args, **kwargs)  # type: ignore[misc]

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """Takes the optimizer's step; with a dynamic loss scale not after an overflow."""
        if not self._scale.needed:
            return super().optimizer_step(optimizer, **kwargs)  # type: ignore[misc]
        return self._scale.step(optimizer, self._parameters(), **kwargs)

    def unscale_gradients(self, optimizer: Any) -> None:
        """Prepares gradients for Fabric's clipping, which refuses those that are not finite."""
        self._scale.before_clipping(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Returns what the quantizers of each model know, in the order of their set-up, and a dynamic loss scale.

        Lightning's Trainer keeps it in the checkpoint under the name of the class.
        """
        models = [each for module in self._live_modules() for each in state.state_dict(module)["models"]]
        models += self._waiting
        if not models:
            return {}
        scaler = self._scale.scaler
        return {
            "version": state.STATE_VERSION,
            "models": models,
            "loss_scalers": [[scaler.state_dict()]] if scaler.dynamic else [],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` returned, before or after the models are set up.

        The states of models that are not there yet wait for them. A level in float32 leaves a state, and the state of
        such a level has nothing to restore: a line in the log says so. Another level takes it if the widths fit.

        Raises:
            TypeError: if it is no dict.
            ValueError: if it is no cnmix state, its modules are not the model's, or a width is over the largest that
                the settings allow; nothing has been changed then.
        """
        saved, modules = state.upgrade(state_dict), list(self._live_modules())
        scales = [each for scalers in saved["loss_scalers"] for each in scalers]
        scaler = self._scale.scaler
        loads_scale = bool(scales) and scaler.dynamic and bool(scales[0].get("dynamic"))
        for module, own in zip(modules, saved["models"], strict=False):
            self._check_module(module, own)
        if loads_scale:
            scaler.check_state(scales[0])

        # Everything has been checked; from here on things change.
        for module, own in zip(modules, saved["models"], strict=False):
            self._load_module(module, own)
        for module in modules[len(saved["models"]) :]:
            logger.warning("loading a cnmix state: without a state: the model %s", type(module).__name__)
        self._waiting = saved["models"][len(modules) :]
        if loads_scale:
            scaler.load_state_dict(scales[0])
        elif scales or scaler.dynamic:
            logger.warning("loading a cnmix state: the loss scale starts anew, at %g", scaler.scale)

    def set_steps_per_epoch(self, steps: int) -> None:
        """Tells every operand how many training steps an epoch has, except where a rule says otherwise."""
        self._steps = steps
        for module in self._live_modules():
            self._tell_steps(module, steps)

    def _tell_steps(self, model: Module, steps: int) -> None:
        book = RuleBook(model, self.rules)
        config = find_level(self.opt_level).configure({**self.settings, "steps_per_epoch": steps})
        set_steps_per_epoch(
            model, lambda fqn: book.configure(model.get_submodule(fqn), config)["input"].steps_per_epoch
        )

    def _check_module(self, module: Module, saved: dict[str, Any]) -> None:
        if find_level(self.opt_level).quantizes and saved["modules"]:
            state.check_fits(unwrap(module), saved)

    def _load_module(self, module: Module, saved: dict[str, Any]) -> None:
        quantizes = find_level(self.opt_level).quantizes
        if quantizes and saved["modules"]:
            state.load_model_state(unwrap(module), saved)
        elif saved["modules"]:
            logger.warning("loading a cnmix state: left, as opt_level %r is float32 throughout", self.opt_level)
        elif quantizes:
            logger.warning("loading a cnmix state: it is of a float32 run, so operands start anew")

    def _live_modules(self) -> Iterator[Module]:
        self._modules = [known for known in self._modules if known() is not None]
        for known in self._modules:
            module = known()
            if module is not None:
                yield module

    def _parameters(self) -> list[Tensor]:
        return [parameter for module in self._live_modules() for parameter in resting_parameters(module)]


class FixedPointTrainerPrecision(FixedPointPrecision):
    """What the plugin for the Trainer adds to the Trainer's ``Precision``.

    The trainer says how many steps an epoch has, and calls a step with the hooks around it.
    """

    def convert_module(self, module: Module) -> Module:
        """Converts the model in place, the only one of this plugin until the next.

        Raises:
            TypeError: if no trainer is attached to it.
        """
        if getattr(module, "_trainer", None) is None:
            name = type(self).__name__
            raise TypeError(
                f"{name} is for the Trainer, and this {type(module).__name__} has none: for Fabric, "
                f"{_import_line(type(self), 'Fabric')}"
            )
        if not any(known is module for known in self._live_modules()):
            self._modules, self._steps = [], None
        return super().convert_module(module)

    @contextlib.contextmanager
    def train_step_context(self) -> Iterator[None]:
        """Takes the steps in an epoch from the trainer, which knows them only once the loop runs."""
        if "steps_per_epoch" not in self.settings:
            for module in self._live_modules():
                steps = batches_in_epoch(module.trainer)
                if steps is not None and steps != self._steps:
                    self.set_steps_per_epoch(steps)
        with super().train_step_context():  # type: ignore[misc]
            yield

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Computes loss and gradients, calls the hooks before a step, clips, and takes the step."""
        if self._scale.needed:
            # The Trainer's own way hands the closure to the optimizer, which cannot skip its step any more then.
            closure = functools.partial(self._wrap_closure, model, optimizer, closure)  # type: ignore[attr-defined]
            return self._scale.step(optimizer, self._parameters(), closure, **kwargs)
        return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Finds the state that another class of plugin saved, for Lightning looks under the name of this one only."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        own, saved = type(self).__qualname__, find_state(checkpoint)
        if own in checkpoint or not find_level(self.opt_level).quantizes:
            return
        if saved is not None:
            logger.info("loading a cnmix state: %s takes that of %s", own, saved)
            checkpoint[own] = checkpoint[saved]
            return
        sets = [quantizers for module in self._live_modules() for _, quantizers in quantizer_sets(module)]
        trained = any(quantizer.state.step for quantizers in sets for _, quantizer in quantizers)
        logger.warning(
            "loading a checkpoint without a cnmix state (of a run without the plugin, or weights only): operands %s",
            "stay as they are, not as they were when it was saved" if trained else "start anew",
        )


def batches_in_epoch(trainer: Any) -> int | None:
    """Returns the training batches in an epoch, or None where nobody knows.

    Of a data set without a length it is what the epochs so far had on average, and in the first epoch, what training
    has at most.
    """
    batches = trainer.num_training_batches
    if math.isfinite(batches):
        return max(1, int(batches))
    progress = trainer.fit_loop.epoch_loop.batch_progress
    before = progress.total.completed - progress.current.completed
    if trainer.current_epoch > 0 and before > 0:
        return max(1, round(before / trainer.current_epoch))
    return trainer.max_steps * trainer.accumulate_grad_batches if trainer.max_steps > 0 else None


def _import_line(plugin: type, prefix: str = "") -> str:
    return f"from {plugin.__module__} import {prefix}{plugin.__name__}"


def _load_section(recipe: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    try:
        from ..recipe import load_section
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'a recipe needs {error.name}: pip install "cnmix[recipes]"', name=error.name
        ) from error
    return load_section(recipe)
