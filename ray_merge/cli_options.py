"""The program and the options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ray_merge import logs

app = typer.Typer(
    name="ray-merge",
    help="Merge many LoRA adapters into large base models, as a batch job on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain usage errors: their last line says what is wrong
)

RecipeArgument = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A recipe: YAML file, local or by URL.", callback=logs.work_on),
]
OutputOption = Annotated[str | None, typer.Option(help="Where results go, in place of the recipe's output.")]
OnlyOption = Annotated[list[str] | None, typer.Option(help="Name or glob of merges; may be repeated.")]
MemoryOption = Annotated[str | None, typer.Option(metavar="SIZE", help="Ceiling per worker, such as 640MB.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AddressOption = Annotated[str, typer.Option(help="local (embedded Ray), auto, or HOST:PORT.")]
EngineOption = Annotated[Literal["ray", "local"], typer.Option(help="local: everything in this process.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
CacheOption = Annotated[Path | None, typer.Option(help="Node-local folder for adapters and digests.")]
LogFormatOption = Annotated[
    logs.LogFormat | None,
    typer.Option(logs.OPTION, help=f"Of stderr; default: {logs.VARIABLE}, or text."),
]
"""Read before the command line is parsed (logs.py), so that usage errors are in that format too."""
