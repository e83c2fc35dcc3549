"""`polar plan`: the cost of a configuration's rollouts, with its assumptions, before anything runs.

The arithmetic is `pipelines/plan.py`; what a run would make now is `polar run --dry-run`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from assets.config import RunConfig
from assets.home import polar_home
from assets.workspace import Workspace
from pipelines.errors import ConfigError
from pipelines.plan import PlanSettings, plan_corpus
from pipelines.settings import parse

console = Console()

PROMPTS = {"prefix": 100_000, "instruction": 10_000}  # for a pool file, which names no prompts


def plan_command(config: Path | None, assume: list[str], *, as_json: bool) -> None:
    """Print the plan of a configuration, or of a pool file with a round number of prompts.

    Raises:
        ConfigError: the file does not hold, an assumption is unknown, or it has no pool.
    """
    workspace = _pool_alone(config) if config and _is_pool(config) else Workspace.load(config)
    if workspace.config.is_recorded:
        msg = f"{workspace.config_path}: recorded answers cost nothing to make; there is no plan"
        raise ConfigError(msg)
    assumed = workspace.config.plan.model_dump() | _given(assume)
    settings = parse(assumed, PlanSettings, "--assume")
    prompts = prompts_of(workspace) or Counter(PROMPTS)
    facts = {
        "configuration": str(workspace.config_path),
        "prompts": dict(prompts),
        **plan_corpus(
            workspace.pool.policies,
            prompts,
            workspace.config.rollouts,
            settings,
            _local_sizes(workspace),
        ),
    }
    if as_json:
        print(json.dumps(facts))
    else:
        _print(facts, workspace.config)


def prompts_of(workspace: Workspace) -> Counter[str]:
    """Prompts by kind: of the files, or of the embedded world; none where there is neither."""
    from pipelines import embedded
    from pipelines.prompt_sources import planned

    config = workspace.config
    if config.prompt_sources:
        return Counter(planned(config.prompt_sources, workspace.config_path.parent))
    if workspace.pool.embedded is not None:
        table = embedded.prompts(config.prompts, config.split, workspace.pool.source)
        return Counter(table["kind"].to_pylist())
    return Counter()


def _is_pool(path: Path) -> bool:
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(said, dict) and "policies" in said


def _pool_alone(path: Path) -> Workspace:
    config = RunConfig(name="plan", pool=path.name)
    return Workspace(home=polar_home(), config=config, config_path=path.resolve())


def _given(assume: list[str]) -> dict[str, str]:
    given = {}
    for one in assume:
        name, equals, value = one.partition("=")
        if not equals:
            msg = f"--assume {one!r}: expected NAME=VALUE, as in gpu_hour=1.8"
            raise ConfigError(msg)
        given[name.strip()] = value.strip()
    return given


def _local_sizes(workspace: Workspace) -> dict[str, float]:
    from pipelines.weights import parameters_of

    found = {
        policy.name: parameters_of(policy.folder(workspace.home))
        for policy in workspace.pool.policies
        if policy.engine == "local"
    }
    return {name: float(size) for name, size in found.items() if size}


def _print(facts: dict[str, Any], config: RunConfig) -> None:
    prompts = ", ".join(f"{count:,} {kind} prompts" for kind, count in facts["prompts"].items())
    rollouts = config.rollouts
    who = (
        "every policy of the kind"
        if rollouts.assignment == "dense"
        else f"{rollouts.policies_per_prompt} policies a prompt"
    )
    console.print(f"{prompts}; {who}, {rollouts.samples} samples each", highlight=False)
    currency = facts["assumptions"]["currency"]
    columns = (
        "size",
        "engine",
        "policies",
        "GPUs each",
        "trajectories",
        "answer tokens",
        "GPU-hours",
    )
    table = Table(*columns, currency)
    for row in (*facts["sizes"], {"size": "all", "engine": "", "gpus_each": 0, **facts["total"]}):
        table.add_row(
            row["size"],
            row["engine"],
            f"{row['policies']:,.0f}",
            str(row["gpus_each"] or ""),
            f"{row['trajectories']:,.0f}",
            _short(row["answer_tokens"]),
            f"{row['gpu_hours']:,.1f}",
            f"{row['money']:,.2f}",
        )
    console.print(table)
    disk = ", ".join(f"{name} {_short(size)}B" for name, size in facts["disk"].items())
    console.print(f"disk: {_short(facts['total']['disk_bytes'])}B ({disk})", highlight=False)
    console.print(f"pairs possible: {facts['total']['pairs_possible']:,}", highlight=False)
    if facts["unknown"]:
        names = ", ".join(facts["unknown"][:8])
        console.print(
            f"size unknown, so without GPU-hours: {names}"
            f"{' and more' if len(facts['unknown']) > 8 else ''}; "
            "give `parameters` in the pool file",
            soft_wrap=True,
            highlight=False,
        )
    said = ", ".join(f"{name}={value}" for name, value in facts["assumptions"].items())
    console.print(f"assumed (--assume NAME=VALUE): {said}", soft_wrap=True, highlight=False)


def _short(number: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f} "
