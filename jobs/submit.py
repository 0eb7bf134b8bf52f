"""One recipe as one Ray job, from anywhere that reaches the head's dashboard: `python jobs/submit.py RECIPE`.

Submits `jobs/merge.py RECIPE` (this folder travels with the job), prints its log, and waits. Exit code: 0 complete, 2
refused before anything was written, 1 failed, stopped or a merge missing, 3 contact lost; the last line on stderr says
why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ray_merge.cli import main
from ray_merge.cli_options import LogFormatOption

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def submit(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="By URL, or a path that the head can read.")
    ],
    address: Annotated[str, typer.Option(metavar="URL", help="Of the head's dashboard: http://HEAD:8265.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- OPTIONS]", help="Of `ray-merge run`: --memory, --workers, --device, --cache-dir."
        ),
    ] = None,
    output: Annotated[str | None, typer.Option(help="In place of the recipe's output.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Name or glob of merges; may be repeated.")] = None,
    date: Annotated[str | None, typer.Option(help="Day for {date} in output; default: today (UTC).")] = None,
    submission_id: Annotated[
        str | None, typer.Option(help="Of the job; default: made of the merges and the date.")
    ] = None,
    stop_on_interrupt: Annotated[
        bool, typer.Option("--stop-on-interrupt", help="SIGINT and SIGTERM also stop the job.")
    ] = False,
    contact_minutes: Annotated[
        float, typer.Option(min=0.0, help="How long the cluster may be silent.")
    ] = 10.0,
    log_format: LogFormatOption = None,
) -> None:
    """Submit a recipe as a Ray job and wait for it; attach where it runs already, do nothing where it is complete."""
    from ray_merge import logs
    from ray_merge import submit as submitting
    from ray_merge.runtime.jobs_api import JobsApi

    request = submitting.Request(
        recipe=logs.work_on(recipe),
        scripts=Path(__file__).resolve().parent,
        output=output,
        only=only or [],
        date=date,
        options=options or [],
        name=submission_id,
    )
    patience = submitting.Patience(
        contact_seconds=60 * contact_minutes,
        stop_on_interrupt=stop_on_interrupt,
        say=lambda text: logs.say(f"submit: {text}", json_text=text),
        log=lambda text: typer.echo(text, nl=False),
    )
    submitting.submit(request, JobsApi(address, 60 * contact_minutes), patience)


if __name__ == "__main__":
    main(program=app)
