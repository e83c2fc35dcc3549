"""Who answers which prompt, what of it is missing, and making that, resumably.

How an answer is computed is in `engines/`, what row it becomes in `answer_rows.py`; nothing here
knows the lake: what exists already comes in as ids, what was made goes out as Parquet files.

Running again makes only what is missing. Answers are in safety the moment they are there, so a
killed run loses at most what the engine was at: its batch, or the requests under way. Adding a
policy unmakes nothing: an assignment says what is wanted, and what an earlier one asked for stays.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from pipelines import ids, schemas, staged
from pipelines.answer_rows import EXCLUDED, Check, Policy, Row, answer_rows, excluded_row
from pipelines.engines.base import Engine, Request
from pipelines.engines.sampling import SamplingSettings
from pipelines.errors import PolarError
from pipelines.policies import SLOT, SYSTEM, render
from pipelines.prompts import system_turn
from pipelines.settings import Settings

Progress = Callable[[int, int, str], None]

ASSIGNMENT = pa.schema(
    [pa.field("prompt_id", pa.uuid(), False), pa.field("policy_id", pa.uuid(), False)]
)
NO_PLACE = "the prompt has a system turn and the template no {system}; write it there"
BLOCK = 4096  # prompts whose hashes with all policies are in memory at a time


class RolloutSettings(Settings):
    """Who answers what, and how often."""

    assignment: Literal["dense", "sparse"] = "sparse"
    policies_per_prompt: int = Field(default=2, ge=1, description="for sparse; the paper has 2")
    samples: int = Field(default=2, ge=1, description="of each policy on each of its prompts")
    sampling: SamplingSettings = SamplingSettings()
    batch_size: int = Field(default=256, ge=1, description="answers made, and staged, at a time")
    seed: int = Field(default=0, ge=0, description="of the sparse assignment")

    @property
    def shares(self) -> bool:
        """Whether prompts are dealt out among policies, so that who asks what depends on others."""
        return self.assignment == "sparse"

    @model_validator(mode="after")
    def _samples_differ(self) -> RolloutSettings:
        if self.sampling.temperature == 0 and self.samples > 1:
            msg = (
                f"temperature 0 gives {self.samples} samples one text; "
                "set samples: 1 or a temperature above 0"
            )
            raise ValueError(msg)
        return self


@dataclass(frozen=True)
class RolloutResult:
    """What a policy's rollout left in staging, and its account.

    `files` hold rows of the trajectories table, some perhaps published before: publish with
    `Upsert`. `counts` are rows of the counts table, stage `rollouts`, label the policy's name.
    `excluded` lists what was wanted and cannot be made, by the columns of `EXCLUDED`.
    `made` is the number of answers made by this call.
    """

    files: list[Path]
    counts: pa.Table
    excluded: pa.Table
    made: int


@dataclass(frozen=True)
class Comparison:
    """Two sets of trajectories: ids on one side only, and every text that differs."""

    only_left: pa.Array
    only_right: pa.Array
    different: pa.Table
    common: int

    @property
    def identical(self) -> float:
        """Share of equal texts among the common ids; 1 where there are none."""
        return 1 - self.different.num_rows / max(self.common, 1)


def answers(policy: Mapping[str, Any]) -> str | None:
    """The kind of prompt a policy is asked: prefix, instruction, or None for recorded ones.

    Base policies continue prefixes, chat and api policies follow instructions. A checkpoint is
    known by its template: one that adds words to the prompt makes it an instruction follower, one
    that is the prompt alone (or missing) a continuer.
    """
    kind = policy["kind"]
    if kind == "checkpoint":
        kind = "base" if (policy["template"] or SLOT).strip() == SLOT else "chat"
    return {"base": "prefix", "chat": "instruction", "api": "instruction"}.get(kind)


def assign(prompts: pa.Table, policies: pa.Table, settings: RolloutSettings) -> pa.Table:
    """Who answers what: (prompt_id, policy_id), in the order of prompts, then of policies.

    `dense`: every policy of the right kind. `sparse`: the `policies_per_prompt` of the right kind
    whose hash with the prompt is smallest; so who answers a prompt does not depend on other
    prompts, and a new policy only takes the places where its hash is smaller.

    Args:
        prompts: prompt_id and kind.
        policies: policy_id, kind and template.
        settings: of the rollouts.
    """
    asked = np.array([answers(row) for row in policies.select(["kind", "template"]).to_pylist()])
    kinds = np.array(prompts["kind"].to_pylist())
    prompt_words, policy_words = ids.words(prompts["prompt_id"]), ids.words(policies["policy_id"])
    pairs = [np.empty((0, 2), np.int64)]
    for kind in schemas.PROMPT_KINDS:
        rows, who = np.flatnonzero(kinds == kind), np.flatnonzero(asked == kind)
        dense = settings.assignment == "dense"
        count = len(who) if dense else min(settings.policies_per_prompt, len(who))
        for start in range(0, len(rows) if count else 0, BLOCK):
            block = rows[start : start + BLOCK]
            hashes = _hashes(prompt_words[block], policy_words[who], settings.seed)
            smallest = np.argpartition(hashes, count - 1, axis=1)[:, :count]
            pairs.append(np.stack([np.repeat(block, count), who[smallest.ravel()]], axis=1))
    at = np.concatenate(pairs)
    at = at[np.lexsort((at[:, 1], at[:, 0]))]
    columns = [prompts["prompt_id"].take(at[:, 0]), policies["policy_id"].take(at[:, 1])]
    return pa.table(columns, schema=ASSIGNMENT)


def prompts_of(policy: Policy, prompts: pa.Table, assignment: pa.Table) -> pa.Table:
    """The rows of `prompts` that an assignment gives to one policy."""
    mine = pc.equal(ids.storage(assignment["policy_id"]), ids.raw(policy["policy_id"]))
    chosen = ids.storage(assignment["prompt_id"]).filter(mine)
    return prompts.filter(pc.is_in(ids.storage(prompts["prompt_id"]), value_set=chosen))


def wanted(policy: Policy, prompts: pa.Table, settings: RolloutSettings) -> pa.Table:
    """All trajectories wanted of a policy, in the order of making: short prompts first.

    Args:
        policy: a row of the policies table.
        prompts: prompt_id, text, messages and source of the prompts assigned to it.
        settings: of the rollouts.

    Returns:
        trajectory_id, sample_index, prompt_id, text, messages, source; `samples` rows a prompt.
    """
    lengths = pc.utf8_length(prompts["text"]).to_numpy()
    high, low = ids.words(prompts["prompt_id"]).T
    order = np.lexsort((low, high, lengths))
    rows = prompts.select(["prompt_id", "text", "messages", "source"])
    rows = rows.take(np.repeat(order, settings.samples))
    samples = np.tile(np.arange(settings.samples, dtype=np.int32), len(order))
    policy_id, sampling_id = ids.raw(policy["policy_id"]), settings.sampling.sampling_id
    made = ids.array(
        ids.content_id("trajectory", policy_id, prompt_id, sampling_id, sample)
        for prompt_id, sample in zip(
            ids.storage(rows["prompt_id"]).to_pylist(), samples.tolist(), strict=True
        )
    )
    rows = rows.add_column(0, "sample_index", pa.array(samples))
    return rows.add_column(0, "trajectory_id", made)


def rollout(
    policy: Policy,
    prompts: pa.Table,
    engine: Engine | None,
    settings: RolloutSettings,
    staging: Path,
    present: Iterable[bytes] | pa.Array | pa.ChunkedArray,
    check: Check | None = None,
    progress: Progress | None = None,
) -> RolloutResult:
    """Make the trajectories of one policy that are wanted and neither present nor staged.

    Args:
        policy: a row of the policies table; its template makes the engine's input of a prompt.
        prompts: prompt_id, text, messages and source of those assigned to it (see `prompts_of`).
        engine: that answers for this policy; None where it cannot (what is staged still counts).
        settings: of the rollouts.
        staging: folder for finished batches; each policy has a folder of its own there.
        present: ids of published trajectories (raw, or an Arrow array).
        check: whether an answer to a prompt (its text) is right, or None where it cannot be said.
        progress: called after each batch.

    Raises:
        PolicyUnavailableError: the engine cannot answer; what was staged stays for the next run.
        PolarError: the account does not add up.
    """
    have = _id_set(present)
    folder = staging / ids.text(policy["policy_id"])
    files, found = staged.take_up(folder, have)
    have |= found
    work = wanted(policy, prompts, settings)
    missing = work.filter(_lacking(work, have)).to_pylist()
    left_out: list[Row] = []
    if engine is None:
        left_out = [excluded_row(policy, row, "policy_unavailable") for row in missing]
    else:
        rows: dict[bytes, Row] = {}
        for row in missing:
            if _placeless(policy, row, engine):
                left_out.append(excluded_row(policy, row, "system_turn", NO_PLACE))
            else:
                rows[ids.raw(row["trajectory_id"])] = row
        total, done = work.num_rows, work.num_rows - len(rows)
        journal = staged.Journal(folder, settings.batch_size)
        start, tokens = time.monotonic(), 0
        requests = _requests(policy, rows, settings)
        with closing(engine.stream(requests, settings.batch_size)) as arriving:
            for arrived in arriving:
                made, refused = answer_rows(policy, rows, arrived, engine, settings.sampling, check)
                files += journal.add(made)
                left_out += refused
                have.update(row["trajectory_id"] for row in made)
                done += len(arrived)
                tokens += sum(row["tokens"] or 0 for row in made)
                if progress:
                    rate = tokens / max(time.monotonic() - start, 1e-9)
                    progress(done, total, f"{policy['name']}, {rate:,.0f} tokens/s")
        files += journal.close()
    excluded = pa.Table.from_pylist(left_out, schema=EXCLUDED)
    counts = _counts(policy, work, have, excluded)
    return RolloutResult(files, counts, excluded, len(missing) - len(left_out))


def compare(left: pa.Table, right: pa.Table) -> Comparison:
    """Compare two makings of the same trajectories; both with trajectory_id and text."""
    ours, theirs = (ids.storage(table["trajectory_id"]) for table in (left, right))
    at = pc.index_in(ours, value_set=theirs)
    both = left.select(["trajectory_id", "text"]).filter(at.is_valid())
    both = both.append_column("other", right["text"].take(at.drop_null()))
    return Comparison(
        only_left=ours.filter(at.is_null()),
        only_right=theirs.filter(pc.invert(pc.is_in(theirs, value_set=ours))),
        different=both.filter(pc.not_equal(both["text"], both["other"])),
        common=both.num_rows,
    )


def _placeless(policy: Policy, row: Row, engine: Engine) -> bool:
    """Whether a prompt has a system turn that the policy cannot be told."""
    placed = engine.chat or SYSTEM in (policy["template"] or SLOT)
    return not placed and system_turn(row["messages"]) is not None


def _requests(
    policy: Policy, rows: Mapping[bytes, Row], settings: RolloutSettings
) -> list[Request]:
    """A request for each wanted row; a system turn goes where the template says, or before it."""
    template = policy["template"] or SLOT
    made = []
    for key, row in rows.items():
        system = system_turn(row["messages"])
        made.append(
            Request(
                trajectory_id=key,
                prompt=render(template, row["text"], system),
                seed=ids.seed_of(key),
                sampling=settings.sampling,
                system=None if SYSTEM in template else system,
            )
        )
    return made


def _counts(policy: Policy, work: pa.Table, have: set[bytes], excluded: pa.Table) -> pa.Table:
    """The account by prompt source: wanted = there + excluded, or something was lost."""
    there = work["source"].filter(pc.invert(_lacking(work, have)))
    rows = Counter((source, "in", "") for source in work["source"].to_pylist())
    rows.update((source, "out", "") for source in there.to_pylist())
    left_out = zip(excluded["source"].to_pylist(), excluded["reason"].to_pylist(), strict=True)
    rows.update((source, "excluded", reason) for source, reason in left_out)
    if work.num_rows != len(there) + excluded.num_rows:
        msg = (
            f"rollouts of {policy['name']}: {work.num_rows} wanted, but {len(there)} there and "
            f"{excluded.num_rows} excluded; run again, and report it if that does not help"
        )
        raise PolarError(msg)
    fixed = {"stage": "rollouts", "label": policy["name"], "split": ""}
    return pa.Table.from_pylist(
        [
            fixed | {"source": source, "what": what, "reason": reason, "rows": count}
            for (source, what, reason), count in sorted(rows.items())
        ],
        schema=schemas.COUNTS.schema,
    )


def _lacking(work: pa.Table, have: set[bytes]) -> pa.Array:
    """Which wanted rows are not there yet."""
    wanted_ids = ids.storage(work["trajectory_id"]).to_pylist()
    return pa.array([one not in have for one in wanted_ids], pa.bool_())


def _id_set(values: Iterable[bytes] | pa.Array | pa.ChunkedArray) -> set[bytes]:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return set(ids.storage(values).to_pylist())
    return set(values)


def _hashes(prompts: np.ndarray, policies: np.ndarray, seed: int) -> np.ndarray:
    """A well-mixed 64-bit hash of each prompt with each policy, (prompts, policies)."""
    return ids.mix(ids.mix(prompts[:, 1] + np.uint64(seed))[:, None] ^ policies[None, :, 1])
