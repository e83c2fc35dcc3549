"""What runs by itself: the weekly refresh of the corpus and of what is trained on it."""

from typing import Any

import dagster as dg

from assets.changes import changes
from assets.maintenance import maintain
from assets.progress import Progress, log_progress
from assets.run import Item, execute
from assets.stages import POLICY_PARTITIONS
from assets.workspace import Workspace


class _LogListener:
    """Shows a refresh in the log of the Dagster run that does it."""

    def __init__(self, log: dg.DagsterLogManager) -> None:
        self.log = log

    def start(self, item: Item) -> Progress:
        self.log.info(f"{item.title}: {item.reason}")
        return log_progress(self.log)

    def finish(self, item: Item, seconds: float, error: str | None) -> None:
        self.log.info(f"{item.title}: {error or 'made'} ({seconds:.0f} s)")

    def wait(self, note: str) -> None:
        self.log.info(note)


@dg.op(
    name="make_what_is_stale",
    description="Make each stage and each policy's partition that is stale, in order.",
    pool="training",
)
def make_what_is_stale(
    context: dg.OpExecutionContext, workspace: dg.ResourceParam[Workspace]
) -> None:
    """Run the plan; a failure names what failed and leaves what was made."""
    from assets.definitions import build_definitions

    reader = workspace.reader()
    before = reader.snapshot() if reader else None
    outcome = execute(
        workspace,
        context.instance,
        build_definitions(workspace),
        listener=_LogListener(context.log),
    )
    told: dict[str, Any] = {
        "made": len(outcome.made),
        "failed": [item.title for item, _ in outcome.failed],
    }
    with workspace.lake() as lake:
        told |= changes(lake, before, lake.snapshot())
    told |= {f"lake: {name.replace('_', ' ')}": n for name, n in maintain(workspace).items()}
    context.add_output_metadata(told)
    if not outcome.ok:
        raise dg.Failure("\n".join(f"{item.title}: {error}" for item, error in outcome.failed))


@dg.job(
    name="refresh_corpus",
    description="Refresh policies, trajectories, pairs, checkpoints and the report: only what is "
    "stale is made.",
)
def refresh_corpus() -> None:
    """One op, so that the order of partitions and stages is that of `polar run`."""
    make_what_is_stale()


@dg.sensor(
    name="new_checkpoints",
    job=refresh_corpus,
    minimum_interval_seconds=60,
    description="Watches the runs of the pool file: a new whole checkpoint becomes a policy with a "
    "partition of its own, and a refresh makes its answers. Off until you switch it on.",
    default_status=dg.DefaultSensorStatus.STOPPED,
)
def new_checkpoints(
    context: dg.SensorEvaluationContext, workspace: dg.ResourceParam[Workspace]
) -> dg.SensorResult | dg.SkipReason:
    """Ask hubs, look into folders, and start a refresh for policies that are no partition yet."""
    from pipelines import hub

    if workspace.config.is_recorded or not workspace.pool_watches:
        return dg.SkipReason("the pool watches no run")
    watches = workspace.pool_watches
    faults = hub.ask([watch.hub for watch in watches if watch.hub], workspace.home)
    for watch in watches:
        faults |= watch.unfinished(workspace.home)
    table = workspace.policies_now()[0]
    ids = {row["name"]: str(row["policy_id"]) for row in table.to_pylist()}
    known = set(context.instance.get_dynamic_partitions("policies"))
    new = sorted(name for name in ids if name not in known)
    if not new:
        left = "; ".join(f"{name}: {reason}" for name, reason in faults.items())
        return dg.SkipReason(f"no new checkpoint{f'; not yet: {left}' if left else ''}")
    context.log.info(f"new: {', '.join(new)}")
    return dg.SensorResult(
        run_requests=[dg.RunRequest(run_key="-".join(ids[name] for name in new))],
        dynamic_partitions_requests=[POLICY_PARTITIONS.build_add_request(new)],
    )


refresh_schedule = dg.ScheduleDefinition(
    name="refresh_corpus",
    job=refresh_corpus,
    cron_schedule="0 3 * * 1",
    description="Every Monday at 03:00. Off until you switch it on.",
    default_status=dg.DefaultScheduleStatus.STOPPED,
)
