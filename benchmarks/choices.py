"""What the options beyond the original algorithm are worth: gradients of a GPT, and whole runs of two recipes.

``python benchmarks/choices.py`` runs everything; docs/choices.md says what came of it. Three options are prototypes
that exist only here, in float arithmetic on quantized values: they were left out of the package for what this measures.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from report import begin, save_json, table
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from cnmix import kernels
from cnmix.fixed_point import FixedPoint, dequantize
from cnmix.nn import modules, quantizer_sets

ROOT = Path(__file__).resolve().parent
OUTPUT = ROOT / "results" / "choices.json"
ROTATED = 32  # rows or columns that one Hadamard matrix mixes, as in INT4 training (arXiv 2306.11987)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def symmetric() -> AbstractContextManager[None]:
    """Clips to [-127, 127]: -128 has no counterpart, which biases (arXiv 2510.25602)."""
    original = kernels.quantize_measured

    def quantize_measured(*args: Any, **kwargs: Any) -> tuple[FixedPoint, kernels.Statistics]:
        quantized, found = original(*args, **kwargs)
        quantized.values.clamp_(min=1 - (1 << (quantized.bits - 1)))
        return quantized, found

    return _replaced(kernels, "quantize_measured", quantize_measured)


def hadamard(size: int) -> Tensor:
    """Returns the orthogonal Hadamard matrix of a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def _rotated(x: Tensor, dim: int) -> Tensor:
    """Mixes blocks of a dimension; as it is where the blocks do not fit."""
    if x.shape[dim] % ROTATED:
        return x
    blocks = x.movedim(dim, -1).unflatten(-1, (-1, ROTATED))
    return (blocks @ hadamard(ROTATED)).flatten(-2).movedim(-1, dim)


def _int8(x: Tensor) -> Tensor:
    return dequantize(kernels.quantize_measured(x.contiguous(), 8, None)[0])


class _Prototype(torch.autograd.Function):
    """The three products on quantized values in float32, with weights per channel or gradients rotated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any, quantizers: Any, training: bool, rest: Any) -> Tensor:
        geometry, per_channel, rotate = rest
        xq = dequantize(quantizers.input(x, training))
        wq = (
            torch.stack([_int8(row) for row in weight])
            if per_channel
            else dequantize(quantizers.weight(weight, training))
        )
        ctx.save_for_backward(xq, wq)
        ctx.quantizers, ctx.training, ctx.geometry, ctx.rotate = quantizers, training, geometry, rotate
        ctx.has_bias, ctx.x_dtype = bias is not None, x.dtype
        y = F.linear(xq, wq, bias) if geometry is None else F.conv2d(xq, wq, bias, *geometry)
        return y.to(quantizers.output_dtype or x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        xq, wq = ctx.saved_tensors
        grad = grad.float()
        gq = dequantize(ctx.quantizers.grad_output(grad, ctx.training))
        if ctx.geometry is not None:
            grad_bias = grad.sum((0, 2, 3)) if ctx.has_bias else None
            grad_x = conv2d_input(xq.shape, wq, gq, *ctx.geometry)
            return grad_x.to(ctx.x_dtype), conv2d_weight(xq, wq.shape, gq, *ctx.geometry), grad_bias, None, None, None
        rows, x_rows = grad.flatten(0, -2), xq.flatten(0, -2)
        if ctx.rotate:  # along what each product sums over, so that the rotations cancel
            grad_x = _int8(_rotated(rows, 1)) @ _int8(_rotated(wq, 0))
            grad_weight = _int8(_rotated(rows, 0)).t() @ _int8(_rotated(x_rows, 0))
        else:
            grad_x, grad_weight = gq.flatten(0, -2) @ wq, gq.flatten(0, -2).t() @ x_rows
        grad_bias = rows.sum(0) if ctx.has_bias else None
        return grad_x.view(xq.shape).to(ctx.x_dtype), grad_weight, grad_bias, None, None, None


def prototype(per_channel: bool = False, rotate: bool = False) -> AbstractContextManager[None]:
    """Serves products from the prototype."""

    def multiply(x: Tensor, weight: Tensor, bias: Any, quantizers: Any, training: bool, geometry: Any = None) -> Tensor:
        return _Prototype.apply(x, weight, bias, quantizers, training, (geometry, per_channel, rotate))

    return _replaced(modules, "multiply", multiply)


@dataclass
class Choice:
    """One option.

    Attributes:
        title: of its row.
        settings: keywords of ``cnmix.initialize``.
        patch: what serves the prototype.
    """

    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    patch: Callable[[], AbstractContextManager[Any]] = nullcontext


def _grad_output(**settings: Any) -> dict[str, Any]:
    return {"rules": [{"operands": "grad_output", **settings}]}


CHOICES = {
    "none": Choice("as it is"),
    "stochastic_gradients": Choice("grad_output stochastic", _grad_output(rounding="stochastic")),
    "stochastic": Choice("all operands stochastic", {"rounding": "stochastic"}),
    "wide_gradients": Choice("grad_output int16", _grad_output(width=16)),
    "saturation": Choice("saturation=0.001", {"saturation": 0.001}),
    "rare": Choice("updates every 300 steps", {"mode": "fixed_interval", "interval": 300}),
    "rare_saturation": Choice(
        "the same, saturation=0.001", {"mode": "fixed_interval", "interval": 300, "saturation": 0.001}
    ),
    "narrowing": Choice("narrowing=0.5", {"narrowing": 0.5}),
    "per_entry": Choice("per_entry, in attention", {"per_entry": True}),
    "per_entry_stochastic": Choice(
        "the same, grad_output stochastic", {"per_entry": True, **_grad_output(rounding="stochastic")}
    ),
    "symmetric": Choice("symmetric, ±127 (prototype)", patch=symmetric),
    "per_channel": Choice("weights per channel (prototype)", patch=lambda: prototype(per_channel=True)),
    "hadamard": Choice("gradients rotated (prototype)", patch=lambda: prototype(rotate=True)),
}


def gradient_error(network: str, key: str, level: str, settle: int) -> dict[str, Any]:
    """Returns the median relative error of a network's gradients after ``settle`` steps of training, dropout off."""
    from arms import Arm
    from networks import TASKS
    from training_step import compare, exact_gradients, without_dropout

    import cnmix

    torch.set_num_threads(1)
    choice, task = CHOICES[key], TASKS[network]
    torch.manual_seed(0)
    model = task.build()
    arm = Arm(task, model, model, scale=True)
    cnmix.initialize(model, arm.optimizer, level, steps_per_epoch=settle, **choice.settings)
    with choice.patch():
        for _ in range(settle + 1):
            arm.step()
        exact = exact_gradients(task, copy.deepcopy(model.state_dict()))
        with without_dropout(model):
            arm.backward()
    return {"median_error": compare(arm.gradients(), exact)["median_error"]}


def run_recipe(name: str, key: str, level: str, seed: int) -> dict[str, Any]:
    """Trains a recipe and returns its loss and accuracy on the test data, and the share of operands at each width."""
    from cnmix.recipe import load_data, load_recipe
    from cnmix.training import train

    torch.set_num_threads(1)
    choice = CHOICES[key]
    overrides = [f"cnmix.{name}={_written(value)}" for name, value in choice.settings.items()]
    recipe = load_recipe(ROOT.parent / "recipes" / f"{name}.yaml", [f"cnmix.opt_level={level}", *overrides])
    with choice.patch(), tempfile.TemporaryDirectory() as folder:
        result, model = train(recipe, level, seed, load_data(recipe), Path(folder), progress=False)
    states = [quantizer.state for _, quantizers in quantizer_sets(model) for _, quantizer in quantizers]
    bits, updates = [state.bits for state in states], [state.updates for state in states]
    return {
        "loss": result.test_loss,
        "accuracy": result.test_accuracy,
        "int8": bits.count(8) / len(bits),
        "updates": statistics.mean(updates),
    }


def _written(value: Any) -> str:
    """Returns the value as a recipe's override writes it."""
    if isinstance(value, list):
        return "[" + ",".join(_written(each) for each in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}: {_written(each)}" for name, each in value.items()) + "}"
    return str(value)


def main() -> None:
    """Runs the experiments from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--choices", nargs="+", choices=CHOICES, default=list(CHOICES), metavar="CHOICE", help=", ".join(CHOICES)
    )
    parser.add_argument("--levels", nargs="+", default=["O1", "O3"])
    parser.add_argument("--recipes", nargs="*", default=["digits", "text"])
    parser.add_argument("--networks", nargs="*", default=["gpt"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settle", type=int, default=12, help="steps before gradients are compared")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the JSON file")
    args = parser.parse_args()
    result = begin("choices")
    jobs: dict[tuple[str, ...], Any] = {}
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        for level in args.levels:
            for key in args.choices:
                if level == "O3" and CHOICES[key].settings.get("narrowing"):
                    continue  # one width has nothing to fall to
                for network in args.networks:
                    job = pool.submit(gradient_error, network, key, level, args.settle)
                    jobs["gradients", network, level, key] = job
                for recipe in args.recipes:
                    for seed in args.seeds:
                        jobs["recipe", recipe, level, key, str(seed)] = pool.submit(
                            run_recipe, recipe, key, level, seed
                        )
        names = {job: " ".join(name) for name, job in jobs.items()}
        for count, job in enumerate(as_completed(names), start=1):
            print(f"{count} of {len(names)}: {names[job]}", file=sys.stderr, flush=True)
        results = {name: job.result() for job, name in names.items()}
    save_json(args.output, result | {"results": results})
    for level in args.levels:
        rows = []
        for key in args.choices:
            cells = [CHOICES[key].title]
            for network in args.networks:
                row = results.get(f"gradients {network} {level} {key}")
                cells.append("–" if row is None else f"{row['median_error']:.3g}")
            for recipe in args.recipes:
                runs = [results.get(f"recipe {recipe} {level} {key} {seed}") for seed in args.seeds]
                known = [run for run in runs if run is not None]
                if not known:
                    cells += ["–"] * 4
                    continue
                for measure, form in (("loss", ".4f"), ("accuracy", ".2%"), ("int8", ".0%"), ("updates", ".0f")):
                    cells.append(format(statistics.mean(float(run[measure]) for run in known), form))
            rows.append(cells)
        columns = ["option", *(f"{network}: error" for network in args.networks)]
        for recipe in args.recipes:
            columns += [f"{recipe}: loss", "accuracy", "int8 operands", "updates"]
        table(f"{level}, mean of seeds {', '.join(map(str, args.seeds))}", columns, rows)
    print(args.output)


if __name__ == "__main__":
    main()
