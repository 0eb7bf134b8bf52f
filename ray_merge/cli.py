"""`ray-merge`: the command line. Options in, one library call, text out; exit codes 0, 1 and 2.

0: complete. 2: refused before anything was written (usage errors too). 1: failed later. The last line on
stderr says why, in one sentence. Commands that make things are here, those that look at them in cli_outputs.py.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from ray_merge import (
    cli_outputs,
    logs,
    show,
    show_evaluate,
    show_moments,
    show_progress,
)
from ray_merge.cli_options import (
    AddressOption,
    CacheOption,
    DeviceOption,
    EngineOption,
    JsonOption,
    LogFormatOption,
    MemoryOption,
    OnlyOption,
    OutputOption,
    RecipeArgument,
    app,
)
from ray_merge.errors import RayMergeError, Refusal, RunFailed, sentence
from ray_merge.interrupts import after_imports


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"ray-merge {importlib.metadata.version('ray-merge')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What stands before the command."""


@app.command()
def plan(
    recipe: RecipeArgument,
    output: OutputOption = None,
    only: OnlyOption = None,
    memory: MemoryOption = None,
    cluster: Annotated[
        str, typer.Option(metavar="SPEC", help="For hours: workers=64,read=1GB/s,write=500MB/s,flops=2T.")
    ] = "",
    emit_kuberay: Annotated[
        bool, typer.Option("--emit-kuberay", help="Print the RayJob that runs the recipe on Kubernetes.")
    ] = False,
    image: Annotated[str | None, typer.Option(help="RayJob: image made by cluster/Dockerfile.")] = None,
    namespace: Annotated[str | None, typer.Option(help="RayJob: default ray-merge.")] = None,
    queue: Annotated[str | None, typer.Option(help="RayJob: LocalQueue of Kueue.")] = None,
    device: Annotated[str | None, typer.Option(help="RayJob: cpu, or cuda for one GPU a worker.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What would be read, merged and written; peak memory; refusals. Reads headers only."""
    from ray_merge import api, show_kuberay
    from ray_merge.plan.estimate import parse_cluster

    workers = parse_cluster(cluster)
    job = show_kuberay.JobOptions(image=image, namespace=namespace, queue=queue, device=device)
    if emit_kuberay:
        if as_json:
            raise Refusal("--emit-kuberay prints YAML; leave out --json")
        show_kuberay.rayjob(recipe, job, workers, output=output, only=only or [], memory=memory)
        return
    job.refuse()
    planned = api.plan(recipe, output=output, only=only or [], memory=memory)
    if as_json:
        typer.echo(json.dumps(show.plan_json(planned, workers), indent=1))
    else:
        show.plan_table(planned, workers)


@app.command()
def run(
    recipe: RecipeArgument,
    output: OutputOption = None,
    address: AddressOption = "local",
    only: OnlyOption = None,
    engine: EngineOption = "ray",
    workers: Annotated[int | None, typer.Option(min=1, help="How many; default: one per CPU.")] = None,
    memory: MemoryOption = None,
    device: DeviceOption = "cpu",
    cache_dir: CacheOption = None,
    date: Annotated[str | None, typer.Option(help="Day for {date} in output; default: today (UTC).")] = None,
    as_json: JsonOption = False,
    log_format: LogFormatOption = None,
) -> None:
    """Run a recipe: every merge is published once. What is complete is left alone."""
    from ray_merge import api

    with show_progress.Progress() as progress:
        result = api.run(
            recipe,
            output=output,
            only=only or [],
            engine=engine,
            address=address,
            workers=workers,
            memory=memory,
            device=device,
            cache_dir=cache_dir,
            date=date,
            progress=progress,
        )
    show.run_result(result, as_json=as_json)


@app.command()
def calibrate(
    recipe: RecipeArgument,
    output: OutputOption = None,
    address: AddressOption = "local",
    engine: EngineOption = "ray",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Stages held at once; default: one per CPU.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Ceiling per stage, such as 1200MB.")
    ] = None,
    device: DeviceOption = "cpu",
    cache_dir: CacheOption = None,
    as_json: JsonOption = False,
    log_format: LogFormatOption = None,
) -> None:
    """Moments of every task's inputs into the store. Every later run reuses them."""
    from ray_merge import moments

    with show_progress.Progress() as progress:
        result = moments.calibrate(
            recipe,
            output=output,
            engine=engine,
            address=address,
            workers=workers,
            memory=memory,
            device=device,
            cache_dir=cache_dir,
            progress=progress,
        )
    show_moments.calibrated(result, as_json=as_json)


@app.command()
def init(
    recipe: RecipeArgument,
    output: Annotated[
        str | None, typer.Option(help="Where the adapters go, in place of the recipe's init.output.")
    ] = None,
    address: AddressOption = "local",
    engine: EngineOption = "ray",
    workers: Annotated[int | None, typer.Option(min=1, help="How many; default: one per CPU.")] = None,
    memory: MemoryOption = None,
    device: DeviceOption = "cpu",
    cache_dir: CacheOption = None,
    as_json: JsonOption = False,
    log_format: LogFormatOption = None,
) -> None:
    """OSRM: adapters to fine-tune from. The other tasks' inputs hardly reach them."""
    from ray_merge import osrm

    with show_progress.Progress() as progress:
        result = osrm.init_adapters(
            recipe,
            output=output,
            engine=engine,
            address=address,
            workers=workers,
            memory=memory,
            device=device,
            cache_dir=cache_dir,
            progress=progress,
        )
    show_moments.initialised(result, as_json=as_json)


@app.command()
def evaluate(
    recipe: RecipeArgument,
    output: OutputOption = None,
    only: OnlyOption = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="Also score merges without TASK on it; may be repeated."),
    ] = None,
    hits: Annotated[
        bool, typer.Option("--hits", help="Also joint Hits@1,3,5 over the labels of all tasks together.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task, from the first.")] = None,
    command: Annotated[
        str | None,
        typer.Option(metavar="CMD", help="Run for each complete merge, with {path} and {name} filled in."),
    ] = None,
    address: AddressOption = "local",
    engine: EngineOption = "ray",
    workers: Annotated[int | None, typer.Option(min=1, help="How many; default: one per CPU.")] = None,
    device: DeviceOption = "cpu",
    cache_dir: CacheOption = None,
    date: Annotated[str | None, typer.Option(help="Day for {date} in output; default: today (UTC).")] = None,
    as_json: JsonOption = False,
    log_format: LogFormatOption = None,
) -> None:
    """Scores of base, single adapters and merges on labelled data. Of merges, those that are complete."""
    from ray_merge.evaluate import evaluate as score
    from ray_merge.evaluate import unsuccessful

    with show_progress.Progress() as progress:
        result = score(
            recipe,
            output=output,
            only=only or [],
            held_out=held_out or [],
            hits=hits,
            limit=limit,
            command=command,
            engine=engine,
            address=address,
            workers=workers,
            device=device,
            cache_dir=cache_dir,
            date=date,
            progress=progress,
        )
    show_evaluate.evaluated(result, as_json=as_json)
    if why := unsuccessful(result):
        raise RunFailed(why)


app.command("verify")(cli_outputs.verify)
app.command("report")(cli_outputs.report)
app.command("status")(cli_outputs.status)
app.command("gc")(cli_outputs.collect)
app.command("inspect")(cli_outputs.inspect)


@app.command()
def methods(as_json: JsonOption = False) -> None:
    """Every merge method: family, spaces, parameters, reference."""
    from ray_merge import api

    if as_json:
        typer.echo(json.dumps(api.methods(), indent=1))
    else:
        show.methods_table(api.methods())


@app.command()
def demo(
    output: Annotated[
        Path | None, typer.Option(help="Folder for the results; default: in the cache.")
    ] = None,
    cache_dir: CacheOption = None,
    engine: EngineOption = "ray",
) -> None:
    """Everything offline: a small model, adapters, merges, scores."""
    from ray_merge.demo.command import run_demo

    run_demo(output=output, cache_dir=cache_dir, engine=engine)


def main(arguments: Sequence[str] | None = None, program: typer.Typer = app) -> NoReturn:
    """Run a program, by default the command line, and exit with its code."""
    stop = after_imports(_stop)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    sys.exit(_exit_code(list(sys.argv[1:] if arguments is None else arguments), program))


def _stop(number: int, frame: FrameType | None) -> None:
    # Units in flight stop at their next chunk; a second signal would only interrupt the tidying up.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise RunFailed(f"stopped by {signal.Signals(number).name}; run the recipe again to finish it")


def _exit_code(arguments: list[str], program: typer.Typer = app) -> int:
    try:
        logs.set_up(logs.asked_format(arguments, os.environ))
        # In JSON typer raises its usage errors, which it would print in several lines otherwise.
        code = program(arguments, standalone_mode=not logs.is_json())
        return code if isinstance(code, int) else 0
    except SystemExit as stop:  # typer's own: 0, or 2 after a usage error
        return stop.code if isinstance(stop.code, int) else 0
    except RayMergeError as error:
        return _fail(str(error), error.exit_code)
    except Exception as error:  # noqa: BLE001  (the last resort: a bug, or a library's error that nobody expected)
        if callable(usage := getattr(error, "format_message", None)):
            return _fail(usage(), getattr(error, "exit_code", 2))
        logs.trace(error)
        return _fail(f"internal error: {type(error).__name__}: {error}", 1)


def _fail(message: str, code: int) -> int:
    text = sentence(" ".join(message.split()))
    logs.say(f"ray-merge: {text}", level=logging.ERROR, json_text=text)
    return code
