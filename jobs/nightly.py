"""All recipes of a folder, once a night: `python jobs/nightly.py --recipes URL --date YYYY-MM-DD`.

Inside a Ray cluster (as a Ray job, or by hand): skips merges that are complete, also under an earlier {date}, runs the
rest, and writes one summary. Creates nothing on Kubernetes.

With --rayjob TEMPLATE.yaml (the pod of a CronJob): looks what there is to make, and if there is anything, creates one
RayJob, named by the date, whose entrypoint is this script without --rayjob; waits until it has ended, and looks at the
manifests.

Exit code: 0 all merges complete; 2 refused before anything was done; with --rayjob, 3 how it ends is not known here
(the API server or the store is silent, --timeout, SIGTERM: the same command goes on looking) and 4 the RayJob failed,
was stopped or was deleted; 1 otherwise: a recipe is refused, a merge is missing. The last line on stderr says why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ray_merge.cli import main
from ray_merge.cli_options import LogFormatOption

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def nightly(
    recipes: Annotated[str, typer.Option(metavar="URL", help="Folder of recipes (*.yaml), or one of them.")],
    date: Annotated[
        str | None, typer.Option(help="YYYY-MM-DD, for {date} in outputs; default: today (UTC).")
    ] = None,
    output: Annotated[str | None, typer.Option(help="In place of every recipe's output.")] = None,
    summary: Annotated[
        str | None, typer.Option(metavar="URL", help="Folder for the summary; default: RECIPES/summaries.")
    ] = None,
    address: Annotated[str, typer.Option(help="local (embedded Ray), auto, or HOST:PORT.")] = "auto",
    engine: Annotated[Literal["ray", "local"], typer.Option(help="local: all in this process.")] = "ray",
    workers: Annotated[int | None, typer.Option(min=1, help="How many; default: one per CPU.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Ceiling per worker.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    cache_dir: Annotated[Path | None, typer.Option(help="Node-local folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    refused_ok: Annotated[
        bool, typer.Option("--refused-ok", help="Exit 0 when only recipes are left that were refused.")
    ] = False,
    log_format: LogFormatOption = None,
    rayjob: Annotated[
        str | None,
        typer.Option(metavar="TEMPLATE.yaml", help="Create this RayJob for the night and wait for it."),
    ] = None,
    of_job: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Job of this pod: its scheduled time says which day it is."),
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="Of the RayJob; default: that of this pod.")] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.0, metavar="SECONDS", help="How long to wait for the RayJob.")
    ] = None,
    contact_minutes: Annotated[
        float, typer.Option(min=0.0, help="How long the API server may be silent.")
    ] = 10.0,
    kubernetes: Annotated[
        str | None, typer.Option(metavar="URL", help="Of the API server; default: that of this pod.")
    ] = None,
) -> None:
    """Run every recipe of a folder; skip what is complete; write one summary."""
    from ray_merge.nightly import Night, command
    from ray_merge.nightly.kubernetes import IN_POD, Kubernetes
    from ray_merge.nightly.rayjob import Waiting
    from ray_merge.nightly.there import run_there

    night = Night(
        recipes=recipes,
        date=date,
        output=output,
        summary=summary,
        engine=engine,
        address=address,
        workers=workers,
        memory=memory,
        device=device,
        cache=cache_dir,
    )
    if rayjob is None:
        command.refuse({"--of-job": of_job is not None}, "is for --rayjob")
        command.run_here(night, as_json=as_json, refused_ok=refused_ok)
    else:
        command.refuse({"--json": as_json, "--refused-ok": refused_ok}, "would have no effect with --rayjob")
        command.refuse({"--of-job": None not in (of_job, date)}, "and --date both say which day it is")
        how = Waiting(timeout_seconds=timeout, contact_seconds=60 * contact_minutes, say=command.say)
        run_there(night, rayjob, namespace, Kubernetes(kubernetes or IN_POD), how, of_job=of_job)


if __name__ == "__main__":
    main(program=app)
