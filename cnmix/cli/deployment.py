"""Commands that make files for inference, and run them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .application import app, console, print_lines


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
    from ..deployment import export_checkpoint

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
    print_lines(*lines, f"sha256 {made.digest}", f"Run it: cnmix infer {made.files[0]}")


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
    from ..deployment import random_inputs, read_inputs, seconds_per_run, write_outputs
    from ..inference import OfflineModel

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
    print_lines(*lines)
