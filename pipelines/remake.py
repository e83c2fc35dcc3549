"""Making a trajectory again from what `explain` says of it, with the engine `local`.

Nothing is read from the lake here: the printout and the weights are all that is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.answer_rows import flags
from pipelines.engines.base import Request
from pipelines.engines.sampling import SamplingSettings
from pipelines.errors import PolicyUnavailableError, QueryError
from pipelines.ids import from_text
from pipelines.policies import render
from pipelines.prompts import system_turn
from pipelines.quality import finish
from pipelines.weights import fingerprint


def remake(facts: Mapping[str, Any], policies: Path, threads: int = 1) -> str:
    """The text of a trajectory, made again.

    Args:
        facts: what `explain` said of a trajectory, as it is or read back from its JSON.
        policies: folder of weights, `POLAR_HOME/policies`; the fingerprint finds the right ones.
        threads: of torch.

    Raises:
        QueryError: not a trajectory of the engine `local`, or its sampling is not exactly known.
        PolicyUnavailableError: no folder holds weights of this fingerprint.
    """
    from pipelines.engines.local import LocalEngine

    trajectory = facts.get("trajectory", {})
    if facts["kind"] != "trajectory" or trajectory["engine"] != "local":
        what = f"engine {trajectory['engine']}" if trajectory else f"a {facts['kind']}"
        msg = f"only trajectories of the engine local can be made again here; this is {what}"
        raise QueryError(msg)
    sampling = dict(facts["sampling"])
    if not sampling.pop("exact"):
        msg = (
            f"trajectory {trajectory['trajectory_id']}: the lake keeps 32 bits of its sampling "
            "values, and more were given; take them from the configuration that made it"
        )
        raise QueryError(msg)
    asked = facts["prompt"]["text"]
    request = Request(
        trajectory_id=from_text(trajectory["trajectory_id"]),
        prompt=render(
            facts["policy"]["template"], asked, system_turn(facts["prompt"].get("messages"))
        ),
        seed=trajectory["seed"],
        sampling=SamplingSettings.model_validate(sampling),
    )
    engine = LocalEngine(weights_of(facts["policy"]["revision"], policies), threads)
    try:
        answers = engine.generate([request])
    finally:
        engine.close()
    return finish(answers[0].text, flags(answers, [asked])[0])[0]


def weights_of(revision: str, policies: Path) -> Path:
    """The folder under `policies` whose weights have a fingerprint.

    Raises:
        PolicyUnavailableError: none has it.
    """
    for config in sorted(policies.rglob("config.json")):
        try:
            if fingerprint(config.parent) == revision:
                return config.parent
        except PolicyUnavailableError:  # unfinished ones
            continue
    msg = f"no folder under {policies} holds weights of fingerprint {revision}; put them there"
    raise PolicyUnavailableError(msg)
