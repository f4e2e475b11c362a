"""A callback for Hugging Face's Trainer; needs ``pip install "cnmix[huggingface]"``.

``Trainer(model=model, args=arguments, callbacks=[CnmixCallback(opt_level="O1")], ...)``
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from . import inference
from .amp import initialize
from .nn import set_steps_per_epoch
from .nn.half import frame
from .rules import Rule, leave_out, parse_rules
from .state import load_state_dict, state_dict
from .strategies import find_level

try:
    from transformers.trainer_callback import ExportableState, TrainerCallback
except ModuleNotFoundError as error:
    if error.name is None or not error.name.startswith("transformers"):
        raise
    raise ModuleNotFoundError(
        'cnmix.huggingface needs transformers and accelerate: pip install "cnmix[huggingface]"', name=error.name
    ) from error

__all__ = ["CnmixCallback", "prepare"]

logger = logging.getLogger("cnmix")

Model = TypeVar("Model", bound=nn.Module)

# What the Trainer calls the file; the quantizers' state is in it among the states of the callbacks.
_STATE_FILE = "trainer_state.json"
_HALF_FLAGS = ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval")


class CnmixCallback(TrainerCallback, ExportableState):
    """Trains in adaptive fixed point under ``transformers.Trainer``.

    The model is converted in place when the Trainer is built. The steps in an epoch come from the trainer's loader
    unless they are given. The quantizers' state is in ``trainer_state.json`` of each checkpoint, the weights there are
    a plain model's; resuming and ``load_best_model_at_end`` restore both.

    Args:
        opt_level: "O0" to "O3", see ``cnmix.initialize``.
        exclude: fully qualified names of modules to leave in float32.
        rules: other settings for some modules or operands, see ``cnmix.initialize``.
        activation_dtype: what flows between products: "float32" or "bfloat16"; the level's by default.
        **settings: any other field of ``cnmix.QuantizeConfig``: bitwidth, max_bitwidth, steps_per_epoch, ….

    Raises:
        TypeError: if ``exclude`` or ``rules`` is no list.
        ValueError: for an unknown level or setting, a value out of its range, or float16.
    """

    def __init__(
        self,
        opt_level: str = "O1",
        *,
        exclude: Sequence[str] = (),
        rules: Sequence[Rule | Mapping[str, Any]] = (),
        activation_dtype: torch.dtype | str | None = None,
        **settings: Any,
    ) -> None:
        self.opt_level = opt_level
        self.settings = {name: value for name, value in settings.items() if value is not None}
        # As they stand in the checkpoint, from which the Trainer can build the callback again.
        self.rules = [_as_mapping(rule) for rule in (*leave_out(exclude), *parse_rules(rules))]
        self.activation_dtype = None if activation_dtype is None else str(activation_dtype).removeprefix("torch.")
        # Refuse bad settings where the callback is written, not when training starts.
        level = find_level(opt_level)
        level.configure(self.settings)
        level.check_rules(parse_rules(self.rules))
        self._activations = level.choose_activations(activation_dtype)
        if self._activations == torch.float16:
            raise ValueError(
                "float16 needs a loss scale, which the Trainer's loop has no place for: take "
                'activation_dtype="bfloat16", or a loop of your own with cnmix.scale_loss'
            )
        self._model: nn.Module | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Converts the model when the Trainer is built."""
        self._convert(args, model)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Restores the state of a checkpoint that training goes on from, and takes the steps in an epoch."""
        self._convert(args, model)  # of model_init, or where the callback was added later
        if state.global_step > 0:
            self._resume(state.stateful_callbacks)
        # The Trainer looks for an entry where it saves; a checkpoint without this callback brought none.
        state.stateful_callbacks.setdefault(type(self).__name__, {})
        if "steps_per_epoch" not in self.settings and _has_length(train_dataloader):
            set_steps_per_epoch(model, lambda fqn: max(1, len(train_dataloader)))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Follows ``load_best_model_at_end``, and leaves the state for ``trainer.save_state()``."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            load_state_dict(_read_state(state.best_model_checkpoint), self._model)
        state.stateful_callbacks[type(self).__name__] = self.state()

    def state(self) -> dict[str, Any]:
        """Returns what the Trainer keeps in ``trainer_state.json``: the arguments, and what the quantizers know."""
        arguments = {"opt_level": self.opt_level, "rules": self.rules, "activation_dtype": self.activation_dtype}
        known = None if self._model is None else state_dict(self._model)
        return {"args": {**arguments, **self.settings}, "attributes": {"cnmix": known}}

    def _convert(self, args: Any, model: nn.Module) -> None:
        asked = [f"{flag}=True" for flag in _HALF_FLAGS if getattr(args, flag, False)]
        from_environment = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if from_environment != "no":
            asked.append(f"ACCELERATE_MIXED_PRECISION={from_environment}")
        if asked:
            raise ValueError(
                f"{asked[0]} and cnmix would both choose the types of activations: drop it; "
                'CnmixCallback(opt_level="O2") has bfloat16 between products'
            )
        settings: dict[str, Any] = dict(self.settings)
        initialize(model, None, self.opt_level, rules=self.rules, activation_dtype=self.activation_dtype, **settings)
        if self._activations != torch.float32:
            # These models compute their loss in forward, from what their parts return.
            for part in model.children():
                frame(part, self._activations)
        self._model = model

    def _resume(self, saved_callbacks: Mapping[str, Any]) -> None:
        for saved in _entries(saved_callbacks):
            level = saved["args"]["opt_level"]
            if level != self.opt_level:
                raise ValueError(
                    f"the checkpoint was trained at opt_level {level!r}, and CnmixCallback has {self.opt_level!r}: "
                    "resume at the same level, or start anew from its weights (from_pretrained)"
                )
            load_state_dict(saved["attributes"]["cnmix"], self._model)
            return
        logger.warning("the checkpoint that training goes on from has no cnmix state: its quantizers start anew")


def prepare(model: Model, folder: str | os.PathLike[str]) -> Model:
    """Turns a plain model into one that infers with a checkpoint's integers, in place.

    Args:
        model: a plain model with the checkpoint's weights: what ``from_pretrained(folder)`` returned.
        folder: a checkpoint of a Trainer with ``CnmixCallback``, or its ``output_dir`` after ``trainer.save_model()``
            and ``trainer.save_state()``.

    Returns:
        The same model, in evaluation mode, its Linear and convolution modules computing on integers.

    Raises:
        FileNotFoundError: if the folder has no ``trainer_state.json``.
        ValueError: if that has no cnmix state, or one that does not fit the model, which is unchanged then.
    """
    return inference.prepare(model, {"state_dict": model.state_dict(), "cnmix": _read_state(folder)})


def _read_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    path = Path(folder) / _STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: give a checkpoint folder of the Trainer, or the folder that trainer.save_model() and "
            "trainer.save_state() wrote to"
        )
    for saved in _entries(json.loads(path.read_text(encoding="utf-8"))["stateful_callbacks"]):
        return saved["attributes"]["cnmix"]
    raise ValueError(f"{path} has no cnmix state: it is not of a Trainer with CnmixCallback")


def _entries(saved_callbacks: Mapping[str, Any]) -> Iterator[Any]:
    """Yields what callbacks of this kind, by whatever name, saved."""
    for saved in saved_callbacks.values():
        if isinstance(saved, Mapping) and saved.get("attributes", {}).get("cnmix") is not None:
            yield saved


def _as_mapping(rule: Rule) -> dict[str, Any]:
    """Returns the rule as ``cnmix.initialize`` takes it, in what JSON has."""
    named = tuple(kind if isinstance(kind, str) else kind.__name__ for kind in rule.types)
    fields = {**vars(dataclasses.replace(rule, types=named))}
    settings = fields.pop("settings")
    return {name: list(each) if isinstance(each, tuple) else each for name, each in fields.items() if each} | settings


def _has_length(loader: Any) -> bool:
    try:
        return isinstance(loader, Sized) and len(loader) > 0
    except TypeError:  # a loader of an iterable data set
        return False
