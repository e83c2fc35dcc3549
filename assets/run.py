"""A run: make what is stale, stage by stage, and nothing else.

`polar run`, the `refresh_corpus` schedule and the tests all come through here. Each stage (and
each policy's partition) is a Dagster run of its own, so the UI shows it like any other.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import dagster as dg
from dagster._core.errors import DagsterExecutionInterruptedError

from assets.claims import claim
from assets.progress import Progress
from assets.stages import Stage, ancestors, stage_making
from assets.staleness import CONFIG_TAG, failed_checks, why_stale, workspace_policy_ids
from assets.turns import alone
from assets.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class Item:
    """Something to make: a stage, or one partition of it, and why."""

    stage: Stage
    partition: str | None = None
    reason: str

    @property
    def title(self) -> str:
        """`stage` or `stage: partition`."""
        return f"{self.stage.name}: {self.partition}" if self.partition else self.stage.name


@dataclass
class Outcome:
    """What a run made, what it could not make, and what stopped it."""

    made: list[Item] = field(default_factory=list)
    failed: list[tuple[Item, str]] = field(default_factory=list)
    stopped: str | None = None

    @property
    def ok(self) -> bool:
        """Whether everything that was wanted is there."""
        return not self.failed and self.stopped is None


class Listener(Protocol):
    """Who watches a run."""

    def start(self, item: Item) -> Progress:
        """An item begins; returns where its progress goes."""

    def finish(self, item: Item, seconds: float, error: str | None) -> None:
        """An item ended."""

    def wait(self, note: str) -> None:
        """Another run is in the way, and will be waited for."""


def stale_items(workspace: Workspace, instance: dg.DagsterInstance, stage: Stage) -> list[Item]:
    """What of a stage has to be made now."""
    partitions: list[str | None] = [None]
    if stage.partitioned:
        partitions = [*workspace_policy_ids(workspace)]
    items = []
    for partition in partitions:
        reason = why_stale(workspace, instance, stage, partition)
        if reason:
            items.append(Item(stage=stage, partition=partition, reason=reason))
    return items


def plan(
    workspace: Workspace, instance: dg.DagsterInstance, until: str | None = None
) -> list[Item]:
    """All that a run would make, as far as can be said before it starts.

    A stage whose upstream is stale is listed as such; partitions of policies that are not yet
    registered stand as one line.
    """
    items: list[Item] = []
    pending: set[str] = set()
    for stage in ancestors(workspace, until):
        waits = [name for name in stage.upstream if stage_making(workspace, name).name in pending]
        found = stale_items(workspace, instance, stage)
        if waits and not stage.partitioned and not found and not stage.idle(workspace):
            found = [Item(stage=stage, reason="after: " + ", ".join(waits))]
        if stage.partitioned and waits:
            found += _waiting_partitions(workspace, stage, waits, found)
        if found:
            pending.add(stage.name)
        items += found
    return items


def _waiting_partitions(
    workspace: Workspace, stage: Stage, waits: list[str], found: list[Item]
) -> list[Item]:
    """Partitions of policies not yet registered, and those that other stages will make stale."""
    known = workspace_policy_ids(workspace)
    stale = {item.partition for item in found}
    after = [name for name in waits if name != "policies"]  # others' weights do not matter
    items = []
    for policy in workspace.pool.policies:
        if policy.name not in known and "policies" in waits:
            reason = "policy not registered yet"
        elif policy.name in known and policy.name not in stale and after:
            reason = "after: " + ", ".join(after)
        else:
            continue
        items.append(Item(stage=stage, partition=policy.name, reason=reason))
    return items


def execute(
    workspace: Workspace,
    instance: dg.DagsterInstance,
    definitions: dg.Definitions,
    *,
    until: str | None = None,
    listener: Listener | None = None,
) -> Outcome:
    """Make what is stale up to the asset `until`.

    A partition that cannot be made is tried once more after the others, and then reported; the
    others go on. A failed stage or blocking check stops the run. What was made stays made: the next
    run goes on from there. Runs of one corpus wait for each other, so that the later one finds
    what the earlier one made.

    Raises:
        ConfigError: another pool file claims this pool's source or the name of one of its policies.
    """
    outcome = Outcome()
    wanted = ancestors(workspace, until)
    with alone(workspace, listener.wait if listener else None):
        claim(workspace)
        for stage in wanted:
            queue = deque(stale_items(workspace, instance, stage))
            tried: set[str | None] = set()
            while queue:
                item = queue.popleft()
                error = _make(workspace, instance, definitions, item, listener)
                if error is None:
                    outcome.made.append(item)
                    continue
                at_fault = failed_checks(workspace, instance, stage, item.partition)
                if item.partition and not at_fault and item.partition not in tried:
                    tried.add(item.partition)
                    queue.append(replace(item, reason=f"once more: {error.splitlines()[0]}"))
                    continue
                outcome.failed.append((item, error))
                if item.partition is None or at_fault:
                    outcome.stopped = item.title
                    return outcome
    return outcome


def _make(
    workspace: Workspace,
    instance: dg.DagsterInstance,
    definitions: dg.Definitions,
    item: Item,
    listener: Listener | None,
) -> str | None:
    """Materialise one item with its checks; the error, if there was one."""
    start = time.monotonic()
    workspace.listener = listener.start(item) if listener else None
    try:
        result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance,
            asset_selection=[dg.AssetKey(name) for name in item.stage.assets],
            partition_key=item.partition,
            raise_on_error=False,
            tags={"polar/reason": item.reason[:200]},
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )
    except DagsterExecutionInterruptedError as interrupt:
        raise KeyboardInterrupt from interrupt
    finally:
        workspace.listener = None
    error = None if result.success else "\n".join(_errors(result)) or "failed; see the Dagster log"
    if listener:
        listener.finish(item, time.monotonic() - start, error)
    return error


def _errors(result: dg.ExecuteInProcessResult) -> Iterator[str]:
    """The innermost message of each failure: the user's fault in words, or the last frames."""
    for check in result.get_asset_check_evaluations():
        if not check.passed:
            detail = "; ".join(
                f"{k}: {v.value}" for k, v in check.metadata.items() if k != CONFIG_TAG
            )
            yield f"check {check.check_name} on {check.asset_key.to_user_string()} failed: {detail}"
    for event in result.all_events:
        if event.is_step_failure and event.step_failure_data.error is not None:
            info = event.step_failure_data.error
            while info.cause is not None and not _is_user_fault(info.cls_name or ""):
                info = info.cause
            kind = info.cls_name or ""
            if kind == "DagsterAssetCheckFailedError":
                continue
            if kind in ("DagsterExecutionInterruptedError", "KeyboardInterrupt"):
                raise KeyboardInterrupt
            if _is_user_fault(kind):
                yield info.message.split(": ", 1)[-1].strip()
            else:
                yield info.message.strip() + "\n" + "".join(info.stack[-4:])


def _is_user_fault(kind: str) -> bool:
    from pipelines import errors as corpus
    from trainer import errors as model

    found = getattr(corpus, kind, None) or getattr(model, kind, None)
    return isinstance(found, type)
