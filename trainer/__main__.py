"""The trainer's own command line: `python -m trainer pretrain|finetune|evaluate|score`.

It reads and writes files only; the commands with the same names under `polar` call the same
functions.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from trainer.errors import TrainerError

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__.splitlines()[0])


Groups = Annotated[
    list[Path], typer.Option("--groups", help="groups file, Parquet or JSONL; may be repeated")
]
Start = Annotated[
    Path, typer.Option("--start", help="language-model or POLAR checkpoint to start from")
]
Out = Annotated[Path, typer.Option("--out", help="folder for the checkpoint; resumed if present")]
Config = Annotated[
    Path | None, typer.Option("--config", help="YAML with any of TrainSettings' values")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="one setting as name=value, e.g. --set lr=3e-4; may be repeated"),
]


@app.command()
def pretrain(
    groups: Groups, start: Start, out: Out, config: Config = None, set_: Set = None
) -> None:
    """Train on policy discrimination; scores use the wrapper `pretrain` unless told otherwise."""
    _train("pretrain", groups, start, out, config, set_)


@app.command()
def finetune(
    groups: Groups, start: Start, out: Out, config: Config = None, set_: Set = None
) -> None:
    """Train on ranked answers; scores use the wrapper `sft` unless told otherwise."""
    _train("finetune", groups, start, out, config, set_)


def _train(
    stage: Literal["pretrain", "finetune"],
    groups: list[Path],
    start: Path,
    out: Path,
    config: Path | None,
    values: list[str] | None,
) -> None:
    from trainer.console import shown
    from trainer.loop import train
    from trainer.settings import read_settings

    settings = read_settings(config, values or [])
    home = os.environ.get("POLAR_HOME")
    cache = Path(home) / "cache" if home else None
    with shown() as progress:
        summary = train(groups, start, out, settings, stage=stage, cache=cache, progress=progress)
    if os.environ.get("RANK", "0") != "0":
        return
    loss, accuracy = summary["loss"], summary["accuracy"]
    typer.echo(
        f"{out}: {summary['steps']} steps, {summary['pairs']} pairs, "
        f"{summary['seconds']:.0f} s, loss {loss:.4f}, accuracy {accuracy:.4f}"
    )


@app.command()
def score(
    checkpoint: Annotated[Path, typer.Argument(help="folder of a POLAR checkpoint")],
    source: Annotated[str, typer.Option("--input", help="JSONL of items, or - for stdin")],
    wrapper: Annotated[
        str | None, typer.Option(help="pretrain or sft, for items that name none themselves")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="an object a line, not a number")] = False,
) -> None:
    """Score items with `prompt`, `reference` and `output`; one line each, in their order."""
    score_command(checkpoint, source, wrapper, as_json)


def score_command(
    checkpoint: Path, source: str, wrapper: str | None = None, as_json: bool = False
) -> None:
    """What `score` does, for other command lines; see `trainer.score.write_scores`."""
    from trainer.score import write_scores

    write_scores(checkpoint, source, sys.stdout, wrapper=wrapper, as_json=as_json)


@app.command()
def evaluate(
    checkpoints: Annotated[list[Path], typer.Argument(help="POLAR checkpoints, the model first")],
    groups: Annotated[list[Path], typer.Option("--groups", help="groups to measure on (eval)")],
    train_groups: Annotated[
        list[Path] | None,
        typer.Option("--train-groups", help="groups to fit rulers on (train); else --groups"),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder for a report")] = None,
    suite: Annotated[list[str] | None, typer.Option(help="only this one; may be repeated")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="an object a line")] = False,
) -> None:
    """Accuracy with intervals, and what rulers get beside it; with --out also as a report."""
    from trainer.evaluate import notes_of
    from trainer.evaluate_files import evaluate_command

    rows = evaluate_command(
        checkpoints, groups, train_groups, out, suites=suite, progress=_progress
    )
    for row in rows.to_pylist():
        typer.echo(json.dumps(row) if as_json else _row(row))
    for note in notes_of(rows):
        typer.echo(note, err=True)


def _row(row: dict[str, Any]) -> str:
    low, high = ("?" if row[end] is None else f"{row[end]:.3f}" for end in ("low", "high"))
    return (
        f"{row['suite']:<22} {row['cell']:<11} {row['category']:<14} {row['metric']:<11} "
        f"{row['scorer']:<20} {row['value']:.3f} [{low}, {high}]  n {row['n']}"
    )


def _progress(done: int, total: int, note: str) -> None:
    if sys.stderr.isatty():
        typer.echo(f"\r{100 * done // max(total, 1):3d} %  {note:<60}", nl=False, err=True)


def main() -> None:
    """Run a command; a fault the user can mend is one line on standard error, status 2."""
    try:
        app()
    except TrainerError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
