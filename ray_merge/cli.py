"""`ray-merge`: the command line. Options in, one library call, text out; exit codes 0, 1 and 2.

0: complete. 2: refused before anything was written (usage errors too). 1: failed later. The last line on
stderr says why, in one sentence.
"""

from __future__ import annotations

import json
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal, NoReturn

import typer

from ray_merge import show, show_evaluate, show_inspect, show_moments, show_progress
from ray_merge.errors import RayMergeError, Refusal, RunFailed

app = typer.Typer(
    name="ray-merge",
    help="Merge many LoRA adapters into large base models, as a batch job on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain usage errors: their last line says what is wrong
)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe: YAML file, local or by URL.")
]
OutputOption = Annotated[str | None, typer.Option(help="Where results go, in place of the recipe's output.")]
OnlyOption = Annotated[list[str] | None, typer.Option(help="Name or glob of merges; may be repeated.")]
MemoryOption = Annotated[str | None, typer.Option(metavar="SIZE", help="Ceiling per worker, such as 640MB.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
AddressOption = Annotated[str, typer.Option(help="local (embedded Ray), auto, or HOST:PORT.")]
EngineOption = Annotated[Literal["ray", "local"], typer.Option(help="local: everything in this process.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
CacheOption = Annotated[Path | None, typer.Option(help="Node-local folder for adapters and digests.")]


@app.command()
def plan(
    recipe: RecipeArgument,
    output: OutputOption = None,
    only: OnlyOption = None,
    memory: MemoryOption = None,
    cluster: Annotated[
        str, typer.Option(metavar="SPEC", help="For hours: workers=64,read=1GB/s,write=500MB/s,flops=2T.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """What would be read, merged and written; peak memory; refusals. Reads headers only."""
    from ray_merge import api
    from ray_merge.plan.estimate import parse_cluster

    workers = parse_cluster(cluster)
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
) -> None:
    """Run a recipe: every merge is published once; what is complete is left alone."""
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
) -> None:
    """Moments of every task's inputs into the store; every later run reuses them."""
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
) -> None:
    """OSRM: adapters to fine-tune from, which the other tasks' inputs hardly reach."""
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
) -> None:
    """Scores of the base, single adapters and complete merges on the labelled data of every task."""
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


@app.command()
def verify(
    output: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="A recipe's output, or one merge's folder.")
    ],
    probe: Annotated[bool, typer.Option(help="Also compare y = (W + dW) x with the factors.")] = True,
    cache_dir: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Re-hash every published file and probe merged weights against base and factors."""
    from ray_merge.verify import verify as check

    show.verified(check(output, cache_dir=cache_dir, probe=probe), as_json=as_json)


@app.command()
def inspect(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Folders of PEFT adapters.")],
    base: Annotated[str | None, typer.Option(help="Base model to fit the adapters to.")] = None,
    cache_dir: CacheOption = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read tensors, and nothing else, from adapter_model.bin.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Ranks, scales, norms, effective rank of adapters; overlap and interference of pairs; what would be refused."""
    from ray_merge.inspect import inspect as look

    found = look(adapters, base=base, cache_dir=cache_dir, allow_pickle=allow_pickle)
    if as_json:
        typer.echo(json.dumps(show_inspect.inspection_json(found), indent=1, allow_nan=False))
    else:
        show_inspect.inspection_table(found)
    if found.refused:
        names = ", ".join(found.refused)
        raise Refusal(f"{len(found.refused)} of {len(found.adapters)} adapter(s) would be refused: {names}")


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
    """Everything offline: a real small model, real adapters, several merges, scores."""
    from ray_merge.demo.command import run_demo

    run_demo(output=output, cache_dir=cache_dir, engine=engine)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    sys.exit(_exit_code(list(sys.argv[1:] if arguments is None else arguments)))


def _stop(number: int, frame: FrameType | None) -> None:
    # Units in flight stop at their next chunk; a second signal would only interrupt the tidying up.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise RunFailed(f"stopped by {signal.Signals(number).name}; run the recipe again to finish it")


def _exit_code(arguments: list[str]) -> int:
    try:
        app(arguments)
    except SystemExit as stop:  # typer's own: 0, or 2 after a usage error
        return stop.code if isinstance(stop.code, int) else 0
    except RayMergeError as error:
        return _fail(str(error), error.exit_code)
    except Exception as error:  # noqa: BLE001  (the last resort: a bug, or a library's error that nobody expected)
        traceback.print_exc()
        return _fail(f"internal error: {type(error).__name__}: {error}", 1)
    return 0


def _fail(message: str, code: int) -> int:
    sentence = " ".join(message.split())
    typer.echo(f"ray-merge: {sentence}", err=True)
    return code
