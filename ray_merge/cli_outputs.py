"""Commands that look at what is there: outputs and adapters."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ray_merge import show, show_gc, show_inspect, show_report, show_status
from ray_merge.cli_options import CacheOption, JsonOption
from ray_merge.errors import Refusal, RunFailed


def verify(
    output: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="A recipe's output, or one merge's folder.")
    ],
    probe: Annotated[bool, typer.Option(help="Also compare y = (W + dW) x with the factors.")] = True,
    cache_dir: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Re-hash every published file, and probe the merged weights. The probe is against base and factors."""
    from ray_merge.verify import verify as check

    show.verified(check(output, cache_dir=cache_dir, probe=probe), as_json=as_json)


def collect(
    output: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="A recipe's output, a folder of several, or a store.")
    ],
    remove: Annotated[bool, typer.Option("--remove", help="Remove what is listed as found.")] = False,
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="What changed since stays: 90m, 24h, 7d.")
    ] = "24h",
    state: Annotated[
        bool, typer.Option("--state", help="Also moments, anchors and learning, which later runs reuse.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """What killed runs left and nobody needs. Temporary files, attempts, uploads, merges without a manifest."""
    from ray_merge.gc import gc

    found = gc(output, remove=remove, older_than=older_than, state=state)
    if as_json:
        typer.echo(json.dumps(show_gc.collected_json(found), indent=1))
    else:
        show_gc.collected(found)


def inspect(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Folders of PEFT adapters.")],
    base: Annotated[str | None, typer.Option(help="Base model to fit the adapters to.")] = None,
    cache_dir: CacheOption = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read tensors, and nothing else, from adapter_model.bin.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """What adapters hold, what would be refused, how near they are. Ranks, scales, norms, effective rank; pairs."""
    from ray_merge.inspect import inspect as look

    found = look(adapters, base=base, cache_dir=cache_dir, allow_pickle=allow_pickle)
    if as_json:
        typer.echo(json.dumps(show_inspect.inspection_json(found), indent=1, allow_nan=False))
    else:
        show_inspect.inspection_table(found)
    if found.refused:
        names = ", ".join(found.refused)
        raise Refusal(f"{len(found.refused)} of {len(found.adapters)} adapter(s) would be refused: {names}")


def report(
    output: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="A recipe's output, or a folder of several.")
    ],
    to: Annotated[
        str | None, typer.Option(metavar="FILE.html", help="Default: OUTPUT/ray_merge/report.html.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """One HTML file about all merges. Layers, learning, scores, times, provenance."""
    from ray_merge.report import report as write

    show_report.reported(write(output, to=to), as_json=as_json)


def status(
    output: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="A recipe's output, also of a running job.")
    ],
    store: Annotated[
        str | None, typer.Option(metavar="URL", help="The recipe's `store`, where it has one.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """How far each merge is. Units, bytes, last receipt, step of learning, what is missing; exit 1 until complete."""
    from ray_merge.status import status as look

    found = look(output, store=store)
    show_status.merges(found, as_json=as_json)
    if left := [one.name for one in found if not one.complete]:
        raise RunFailed(f"{len(left)} of {len(found)} merge(s) are not complete, first {left[0]}")
