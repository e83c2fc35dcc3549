"""The trainer's own command line: `python -m trainer pretrain|finetune|evaluate|score|...`.

It reads and writes files only. `polar score` and `polar evaluate` call the same functions;
`polar finetune` is `own`'s, which chooses settings by the rows.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal, cast

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
Recipe = Annotated[
    str | None,
    typer.Option("--recipe", help="published settings by name (see `recipes`), under --config"),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="one setting as name=value, e.g. --set lr=3e-4; may be repeated"),
]


def _training(stage: Literal["pretrain", "finetune"], what: str) -> None:
    """Add the command of a training stage."""

    @app.command(stage, help=what)
    def command(
        groups: Groups,
        start: Start,
        out: Out,
        config: Config = None,
        set_: Set = None,
        recipe: Recipe = None,
    ) -> None:
        from trainer.console import shown
        from trainer.loop import train
        from trainer.settings import read_settings

        settings = read_settings(config, set_ or [], recipe)
        home = os.environ.get("POLAR_HOME")  # else ids are kept in OUT until the run ends
        cache = Path(home) / "cache" if home else None
        with shown() as progress:
            summary = train(
                groups, start, out, settings, stage=stage, cache=cache, progress=progress
            )
        if os.environ.get("RANK", "0") != "0":
            return
        loss, accuracy = summary["loss"], summary["accuracy"]
        typer.echo(
            f"{out}: {summary['steps']} steps, {summary['pairs']} pairs, "
            f"{summary['seconds']:.0f} s, loss {loss:.4f}, accuracy {accuracy:.4f}"
        )


_training(
    "pretrain",
    "Train on policy discrimination; scores use the wrapper `pretrain` unless told otherwise.",
)
_training(
    "finetune", "Train on ranked answers; scores use the wrapper `sft` unless told otherwise."
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
    from trainer.console import print_evaluation, shown
    from trainer.evaluate_files import evaluate_command

    with shown() as progress:
        rows = evaluate_command(
            checkpoints, groups, train_groups, out, suites=suite, progress=progress
        )
    print_evaluation(rows, as_json=as_json)


@app.command()
def recipes() -> None:
    """List the published settings that --recipe takes."""
    from trainer.recipes import RECIPES, names

    for name, what in names().items():
        typer.echo(f"{name:<24} {what}")
    typer.echo(f"Each is a file of {RECIPES}, with a source beside every value.")


@app.command()
def law(
    parameters: Annotated[float, typer.Option(help="of the model, for example 1.8e9")],
    pretrain_tokens: Annotated[float, typer.Option(help="the language model was trained on")],
    reward_tokens: Annotated[float, typer.Option(help="of POLAR pre-training")],
) -> None:
    """The paper's learning rate and batch for pre-training, as YAML for --config."""
    from trainer.recipes import law as law_of

    rate = law_of(
        parameters=parameters, pretrain_tokens=pretrain_tokens, reward_tokens=reward_tokens
    )
    typer.echo(f"lr: {rate.lr:.4e}\nbatch_groups: {max(1, round(rate.batch))}")


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="InternLM2ForRewardModel folder, or a Llama-layout checkpoint")
    ],
    out: Annotated[Path, typer.Argument(help="folder to make")],
    like: Annotated[
        Path | None,
        typer.Option(help="on the way back: official folder to take code and tokenizer from"),
    ] = None,
    wrapper: Annotated[
        str, typer.Option(help="on the way in: sft, or pretrain for a -Base checkpoint")
    ] = "sft",
) -> None:
    """Official POLAR weights into a plain checkpoint, or a plain checkpoint back."""
    from trainer.console import shown
    from trainer.convert import convert as convert_folder

    if wrapper not in ("pretrain", "sft"):
        msg = f"--wrapper {wrapper!r}: give sft, or pretrain for a -Base checkpoint"
        raise TrainerError(msg)
    with shown() as progress:
        made = convert_folder(
            source,
            out,
            like=like,
            wrapper=cast('Literal["pretrain", "sft"]', wrapper),
            progress=progress,
        )
    typer.echo(f"{out}: {made}")


def main() -> None:
    """Run a command; a fault the user can mend is one line on standard error, status 2."""
    try:
        app()
    except TrainerError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
