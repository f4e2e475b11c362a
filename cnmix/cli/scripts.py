"""Commands for scripts of one's own, and what serves them."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from .application import app


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

    from ..torch_mlu.installation import vendor_package
    from ..torch_mlu.running import environment
    from ..torch_mlu.running import run as run_python

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
    from ..kernels import show_config

    show_config()
