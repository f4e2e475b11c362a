"""The command ``cnmix``."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError as error:
    sys.exit(f'the command cnmix needs {error.name}: pip install "cnmix[recipes]"')

from .version import __version__

if TYPE_CHECKING:
    from .training import RunResult

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _describe(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Say it.")] = False,
) -> None:
    """Train PyTorch models in adaptive fixed point, and evaluate them with integers."""


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as optimizer.args.lr=0.1")] = None,
    compare: Annotated[bool, typer.Option(help="Also train the float32 baseline from the same seeds.")] = False,
    levels: Annotated[
        str | None, typer.Option(help="Levels to train at, as O0,O1,O2,O3, in place of the recipe's own.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="A run's last.ckpt to go on from.")] = None,
) -> None:
    """Train a recipe; leaves runs/<recipe>/<time>/ with its settings, metrics and checkpoints."""
    from .evaluation import operand_rows
    from .recipe import load_recipe
    from .strategies import find_level
    from .training import run_recipe

    loaded = load_recipe(recipe, overrides or [])
    folder, results, model = run_recipe(
        loaded,
        recipe.stem,
        compare=compare,
        levels=() if levels is None else [name.strip() for name in levels.split(",")],
        resume=resume,
        progress=console.is_terminal,
        report=lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True),
    )
    rows = list(operand_rows(model))
    if rows:
        table = Table(title=f"Operands after the last {results[-1].level} run")
        table.add_column("module", overflow="fold")  # in a narrow terminal a long name is not cut but goes on below
        table.add_column("operand", no_wrap=True)
        for heading in ("width", "position", "interval", "updates", "error (QEM)"):
            table.add_column(heading, justify="right", no_wrap=heading != "error (QEM)")
        for fqn, operand, bits, position, interval, updates, qem in rows:
            values = (f"int{bits}", str(position), str(interval), str(updates), f"{qem:.2e}")
            table.add_row(fqn if operand == "input" else "", operand, *values, end_section=operand == "grad_output")
        console.print(table)
    console.print(_results_table(results))
    lines = [f"Kept in {folder}"]
    if any(find_level(result.level).quantizes for result in results):
        lines.append(f"Evaluate with integers: cnmix eval {folder}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command("eval")
def evaluate(
    path: Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint in it.")],
    module: Annotated[Path | None, typer.Option(help="The recipe's Python file, if it has moved.")] = None,
) -> None:
    """Evaluate checkpoints in float32 and with integers at the positions that training stored."""
    from .evaluation import evaluate_checkpoints

    table = Table(title="Test accuracy and loss")
    for heading in ("checkpoint", "level", "seed", "float32", "integer"):
        table.add_column(heading, justify="left" if heading in ("checkpoint", "level") else "right", overflow="fold")
    for each in evaluate_checkpoints(path, module):
        pairs = ((each.float_accuracy, each.float_loss), (each.integer_accuracy, each.integer_loss))
        cells = [f"{accuracy:.2%}  {loss:.4f}" if accuracy is not None else "–" for accuracy, loss in pairs]
        shown = str(Path(each.file).relative_to(path)) if path.is_dir() else path.name
        table.add_row(escape(shown), each.level, str(each.seed), *cells)
    console.print(table)


@app.command("export")
def export(
    path: Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint in it.")],
    output: Annotated[
        Path | None, typer.Option(help="The offline model; else beside the checkpoint, as model.cambricon.")
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also the quantized ONNX form, with the suffix .onnx.")] = False,
    vendor: Annotated[
        bool, typer.Option("--vendor", help="Also the vendor's quantized state_dict, with the suffix .pth.")
    ] = False,
    batch: Annotated[int, typer.Option(help="Samples that it takes at once.")] = 1,
    core_number: Annotated[int, typer.Option(help="Cores that it is for.")] = 1,
    core_version: Annotated[str, typer.Option(help="Card that it is for, as MLU270; any by default.")] = "",
    module: Annotated[Path | None, typer.Option(help="The recipe's Python file, if it has moved.")] = None,
) -> None:
    """Write a checkpoint as an offline model, which infers with integers and without the model's code."""
    from .deployment import export_checkpoint

    made = export_checkpoint(
        path,
        output,
        onnx=onnx,
        vendor=vendor,
        batch=batch,
        core_number=core_number,
        core_version=core_version,
        module=module,
    )
    lines = [f"{file}: {file.stat().st_size:,} bytes" for file in made.files]
    for line in (*lines, f"sha256 {made.digest}", f"Run it: cnmix infer {made.files[0]}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command("infer")
def infer(
    file: Annotated[Path, typer.Argument(help="An offline model.")],
    input: Annotated[
        list[Path] | None, typer.Option(help="What to run it on: .npy, .pt or .safetensors; one for each input.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where to put what it returns: .npy or .safetensors.")] = None,
    repeat: Annotated[int, typer.Option(min=0, help="Time as many runs.")] = 0,
    sha256: Annotated[str | None, typer.Option(help="The digest that the file must have.")] = None,
) -> None:
    """Describe an offline model and run it, with no access to the model's code."""
    from .deployment import random_inputs, read_inputs, seconds_per_run, write_outputs
    from .inference import OfflineModel

    model = OfflineModel(file, sha256)
    table = Table(title=escape(f"Offline model {model.name}"), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, tensors in (("input", model.inputs), ("output", model.outputs)):
        for name, shape, dtype in tensors:
            table.add_row(label, f"{name}: {str(dtype).removeprefix('torch.')} {shape}")
    table.add_row("batch size", str(model.batch_size))
    table.add_row("core number", str(model.core_number))
    table.add_row("core version", escape(model.core_version) or "any")
    operators = len({step.operator for step in model.program.steps})
    table.add_row("operators", f"{len(model.program.steps)} calls of {operators}")
    table.add_row("size", f"{model.size:,} bytes")
    table.add_row("written by", escape(f"cnmix {model.cnmix_version}, torch {model.torch_version}"))
    for key, text in model.metadata.items():
        table.add_row(escape(ascii(key)[1:-1]), escape(ascii(text)[1:-1]))
    console.print(table)
    inputs = read_inputs(model, input) if input else random_inputs(model)
    outputs = model(*inputs)
    lines = [f"sha256 {model.digest}"]  # in one piece, to be copied
    lines += [] if input else ["Run on random input, as no --input is given"]
    if output is not None:
        write_outputs(model, outputs, output)
        lines.append(f"Kept in {output}")
    if repeat:
        seconds = seconds_per_run(model, inputs, repeat)
        lines += [f"Throughput(fps): {model.batch_size / seconds:.2f}", f"Latency(ms): {seconds * 1000:.3f}"]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command(
    "run",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)
def run(
    context: typer.Context,
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is a module, as with python -m.")] = False,
    cards: Annotated[
        int | None, typer.Option(help="How many emulated cards there are; else MLU_VISIBLE_DEVICES.")
    ] = None,
    card: Annotated[
        str | None, typer.Option(help="MLU220, 270, 290, 370 or 590; else DEFAULT_MLU_DEVICE_NAME, or MLU370.")
    ] = None,
    strict_device: Annotated[
        bool, typer.Option("--strict-device", help="Refuse what a card would refuse, as mixed host and card tensors.")
    ] = False,
    script: Annotated[str, typer.Argument(metavar="SCRIPT", help="What to run; the rest is its arguments.")] = ...,  # type: ignore[assignment]
) -> None:
    """Run a script with the emulated torch_mlu and the device mlu in place, and the processes that it starts."""
    import os

    from .torch_mlu.installation import vendor_package
    from .torch_mlu.running import environment
    from .torch_mlu.running import run as run_python

    arguments = [*(["-m"] if module else []), script, *context.args]
    vendor = vendor_package()
    if vendor is not None:
        console_of_errors = Console(stderr=True)
        console_of_errors.print(
            f"the vendor's torch_mlu is installed ({vendor}): it serves, not the emulation", markup=False
        )
        raise typer.Exit(run_python(arguments, dict(os.environ)))
    raise typer.Exit(run_python(arguments, environment(cards, card, strict_device)))


@app.command("config")
def config() -> None:
    """Say which kernels serve on this machine, and why."""
    from .kernels import show_config

    show_config()


def main() -> None:
    """Runs the command; a mistake in what it was given is one line, not a traceback."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        Console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)
        sys.exit(2)


def _results_table(results: list[RunResult]) -> Table:
    """Returns a column for each level, and for each seed and their mean a row for each measure."""
    levels = list(dict.fromkeys(result.level for result in results))
    seeds = list(dict.fromkeys(result.seed for result in results))
    labels = {"O0": "float32 (O0)"}
    table = Table(title="Results on the test data")
    table.add_column("seed", justify="right")
    table.add_column("")
    for level in levels:
        table.add_column(labels.get(level, level), justify="right")
    groups = [(str(seed), [result for result in results if result.seed == seed]) for seed in seeds]
    if len(seeds) > 1:
        groups.append(("mean", results))
    for name, group in groups:
        columns = [[result for result in group if result.level == level] for level in levels]
        accuracies = [f"{statistics.mean(each.test_accuracy for each in column):.2%}" for column in columns]
        seconds = [f"{statistics.mean(each.seconds for each in column):.1f}" for column in columns]
        table.add_row(name, "accuracy", *accuracies)
        table.add_row("", "loss", *(_mean_loss(column) for column in columns))
        table.add_row("", "seconds", *seconds, end_section=True)
    return table


def _mean_loss(results: list[RunResult]) -> str:
    losses = [result.test_loss for result in results if result.test_loss is not None]
    return f"{statistics.mean(losses):.4f}" if len(losses) == len(results) else "–"


if __name__ == "__main__":
    main()
