"""The `polar` command: one meaning everywhere, thin over `run`, `sql` and the trainer.

Heavy imports stay inside commands so that `--help` is quick.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from assets.home import PROJECT, polar_home
from pipelines.errors import PolarError

app = typer.Typer(
    name="polar",
    help="Make POLAR reward models from scratch: a corpus, a lake, a checkpoint, a report.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Run configuration (default: configs/demo.yaml)."),
]
DataOption = Annotated[
    Path | None, typer.Option("--data", "-d", help="Folder or file of recorded trajectories.")
]
FormatOption = Annotated[str, typer.Option("--format", "-f", help="table, csv, json or parquet.")]


@app.command()
def run(
    config: ConfigOption = None,
    data: DataOption = None,
    until: Annotated[
        str | None, typer.Option(help="Stop after this asset (for example: pairs).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be made, with counts; make nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> None:
    """Make what is stale, in order, and end with a summary. Stop at any time and run again."""
    from assets.console import dry_run_command, run_command
    from assets.workspace import Workspace

    workspace = Workspace.load(config, data)
    workspace.require_inputs()
    os.environ["DAGSTER_HOME"] = str(PROJECT)
    if dry_run:
        dry_run_command(workspace, until, as_json=as_json)
        return
    try:
        complete = run_command(workspace, until, as_json=as_json)
    except KeyboardInterrupt:
        errors.print("Stopped. The same command goes on from here.")
        raise typer.Exit(130) from None
    if not complete:
        raise typer.Exit(1)


@app.command()
def up(
    config: ConfigOption = None,
    data: DataOption = None,
    port: Annotated[int, typer.Option(help="Port of the web interface, on loopback.")] = 3000,
) -> None:
    """Start the Dagster UI and daemon on this home and configuration; Ctrl-C stops both."""
    from assets.workspace import Workspace

    workspace = Workspace.load(config, data)
    workspace.require_inputs()
    environment = os.environ | {
        "DAGSTER_HOME": str(PROJECT),
        "POLAR_HOME": str(workspace.home),
        "POLAR_CONFIG": str(workspace.config_path),
        **({"POLAR_DATA": str(workspace.data)} if workspace.data else {}),
    }
    command = [sys.executable, "-m", "dagster", "dev", "-m", "assets.definitions"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    console.print(f"Dagster UI: http://127.0.0.1:{port}  (home {workspace.home}; Ctrl-C stops it)")
    # Before the start: in a shell's background job SIGINT is ignored, and Dagster, which stops its
    # services by it, would inherit that.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: process.send_signal(signal.SIGINT))
    # A session of its own, so that Ctrl-C reaches Dagster once: from here.
    process = subprocess.Popen(command, cwd=PROJECT, env=environment, start_new_session=True)
    code = process.wait()
    raise typer.Exit(0 if code in (0, -signal.SIGINT, 130) else code)


@app.command()
def sql(
    query: Annotated[str | None, typer.Argument(help="SELECT to run; none opens a prompt.")] = None,
    format: FormatOption = "table",  # noqa: A002 - the option's name
    snapshot: Annotated[int | None, typer.Option(help="Read the lake as of this snapshot.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write here.")] = None,
) -> None:
    """Ask the lake. Reading only; works while a run is writing."""
    from assets import sql as lake_sql

    if query is None:
        lake_sql.prompt(polar_home())
    else:
        lake_sql.run_query(polar_home(), query, format, snapshot, output)


@app.command()
def score(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a POLAR checkpoint.")],
    input: Annotated[  # noqa: A002 - the option's name
        str, typer.Option("--input", "-i", help="JSONL of prompt, reference, output; - for stdin.")
    ],
    wrapper: Annotated[
        str | None, typer.Option(help="pretrain or sft (default: as the checkpoint says).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Score candidates against references: one number a line, in input order."""
    from trainer.score import write_scores

    write_scores(checkpoint, input, sys.stdout, wrapper=wrapper, as_json=as_json)


@app.command()
def finetune(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a POLAR checkpoint.")],
    data: Annotated[
        Path,
        typer.Option("--data", "-d", help="Ranked answers, JSONL or Parquet."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the new checkpoint.")],
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Training settings (YAML).")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="One setting: name=value; may be repeated.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Published settings by name.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> None:
    """Fine-tune on your own ranked answers; ends with their scores before and after."""
    from assets.own import finetune_command

    finetune_command(checkpoint, data, out, config, set_ or [], recipe, as_json=as_json)


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a POLAR checkpoint.")],
    suite: Annotated[
        list[str] | None, typer.Option(help="Only this suite; may be repeated.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", "-d", help="Groups file or folder (default: the home's groups)."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for a report.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Accuracy on held-out groups with intervals, and what rulers get beside it."""
    from assets.own import evaluate_command

    evaluate_command(checkpoint, suite, data, out, as_json=as_json)


@app.command()
def similar(
    text: Annotated[str, typer.Argument(help="Text to look for.")],
    top: Annotated[int, typer.Option(min=1, help="At most this many answers.")] = 10,
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Find trajectories that are near-duplicates of a text."""
    from assets.console import similar_command
    from assets.workspace import Workspace

    similar_command(Workspace.load(config), text, top, as_json=as_json)


@app.command()
def plan(
    config: ConfigOption = None,
    assume: Annotated[
        list[str] | None, typer.Option(help="Another assumption, NAME=VALUE; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Print what a corpus will cost before anything runs. FILE may also be a pool file."""
    from assets.plan import plan_command

    plan_command(config, assume or [], as_json=as_json)


@app.command()
def explain(
    id: Annotated[  # noqa: A002 - the argument's name
        str, typer.Argument(help="A trajectory or checkpoint, or A:B for a pair; beginnings do.")
    ],
    again: Annotated[
        bool, typer.Option("--again", help="Make the trajectory again and compare (engine local).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Print where something comes from and what became of it: policy, seed, rule, snapshot."""
    from assets.provenance import explain_command

    if not explain_command(polar_home(), id, again=again, as_json=as_json):
        raise typer.Exit(1)


@app.command()
def diff(
    before: Annotated[int, typer.Argument(help="Snapshot to start from.")],
    after: Annotated[int | None, typer.Argument(help="Snapshot to end at: the newest.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Print what changed between two snapshots: rows, policies, balance, duplicates."""
    from assets.provenance import diff_command

    diff_command(polar_home(), before, after, as_json=as_json)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: faults that the user can mend are one message, not a traceback."""
    from trainer.errors import TrainerError

    try:
        code: Any = app(arguments, prog_name="polar", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except (PolarError, TrainerError) as error:
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        errors.print(f"error: {error.format_message()}", markup=False, soft_wrap=True)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
