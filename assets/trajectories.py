"""The asset `trajectories`: each policy of the pool is asked for what it has not answered yet.

One partition a policy. What is wanted, and how answers are kept, is in `pipelines/rollouts.py`; how
a policy is asked, in `pipelines/engines`.
"""

from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc

from assets.results import AUTHOR, count_plot, made, progress_of, table_link
from assets.stages import asset_kwargs
from assets.staleness import AMONG, OWED, ROWS, workspace_policy_ids
from assets.workspace import Workspace
from pipelines.attach import quoted
from pipelines.engines.base import PASSING, Engine
from pipelines.errors import PolicyUnavailableError
from pipelines.lake import Change, Replace, Upsert

SHOWN = 20


def trajectories_of(workspace: Workspace) -> dg.AssetsDefinition:
    """The asset of a configuration's pool.

    Its runs take a place of the Dagster pool `gpu` (limit 1) where a server of vLLM answers, else
    of `rollouts`.
    """
    from pipelines.engines.choose import engine_of

    policies = workspace.pool.policies
    served = any(engine_of(p, workspace.config.engine) == "vllm" for p in policies)
    return dg.asset(
        **asset_kwargs("trajectories"),
        name="trajectories",
        pool="gpu" if served else "rollouts",
        description="Answers of one policy to its prompts, one partition a policy. Only what is "
        "wanted and not yet there is made; a stopped run goes on from its last answer.",
    )(_trajectories)


def _trajectories(
    context: dg.AssetExecutionContext, workspace: dg.ResourceParam[Workspace]
) -> dg.MaterializeResult:
    """Wanted less present, asked of the policy's engine, published in one transaction.

    What an engine made before it failed is published too; the failure is raised afterwards.
    """
    from pipelines import embedded, rollouts, staged
    from pipelines.engines.choose import open_engine
    from pipelines.hub import check_revision

    settings, source = workspace.config.rollouts, workspace.pool.source
    with workspace.lake() as lake:
        ids = list(workspace_policy_ids(workspace).values())
        policies = lake.query("from policies where list_contains(?, policy_id::varchar)", [ids])
        prompts = lake.query("from prompts where source = ?", [source])
        named = policies.filter(pc.equal(policies["name"], context.partition_key))
        if not named.num_rows:
            msg = f"policy {context.partition_key!r} is not registered: materialise `policies`"
            raise PolicyUnavailableError(msg)
        policy = named.to_pylist()[0]
        spec = next(p for p in workspace.pool.policies if p.name == context.partition_key)
        if spec.on_hub:
            check_revision(spec.weights, spec.revision or "")
        asked = rollouts.prompts_of(policy, prompts, rollouts.assign(prompts, policies, settings))
        with staged.owned(workspace.staging_dir, policy["policy_id"]):
            present = lake.query(
                "select trajectory_id from trajectories where policy_id = ?", [policy["policy_id"]]
            )
            engine = open_engine(
                spec,
                workspace.pool,
                workspace.home,
                policy_id=str(policy["policy_id"]),
                threads=workspace.config.threads,
                instead=workspace.config.engine,
            )
            failure: PolicyUnavailableError | None = None
            arguments = (settings, workspace.staging_dir, present["trajectory_id"])
            try:
                result = rollouts.rollout(
                    policy,
                    asked,
                    engine,
                    *arguments,
                    check=embedded.check,
                    progress=progress_of(context, workspace),
                )
            except PolicyUnavailableError as error:
                failure = error
                result = rollouts.rollout(policy, asked, None, *arguments)
            finally:
                engine.close()
            changes: list[Change] = [
                Upsert("trajectories", result.files),
                Replace(
                    "counts",
                    result.counts,
                    f"stage = 'rollouts' and label = {quoted(policy['name'])}",
                ),
            ]
            snapshot = lake.publish(
                AUTHOR, f"trajectories of {policy['name']}: {result.made:,} made", changes
            )
            staged.clear(result.files)
        if failure:
            raise failure
        totals = lake.query(
            "select count(*) as answers, avg(length(text)) as characters, "
            "avg(correct::int) as correct from trajectories where policy_id = ?",
            [policy["policy_id"]],
        ).to_pylist()[0]
    return made(
        context,
        workspace,
        {
            ROWS: totals["answers"],
            "made now": result.made,
            "mean characters": round(totals["characters"] or 0.0, 1),
            "share correct": round(totals["correct"], 3) if totals["correct"] is not None else "",
            "engine": f"{engine.name}, {engine.version}",
            "excluded": result.excluded.num_rows,
            **_owed(result.excluded),
            **({AMONG: dg.MetadataValue.json(sorted(ids))} if settings.shares else {}),
            **_set_aside(result.excluded),
            **_usage(engine),
            "snapshot": snapshot,
            "counts": count_plot(f"answers of {policy['name']}", result.counts),
            **table_link("trajectories"),
        },
    )


def _set_aside(excluded: pa.Table) -> dict[str, Any]:
    """What was kept out for a reason that has a story, as metadata: the first of them."""
    told = excluded.filter(pc.is_valid(excluded["detail"])).slice(0, SHOWN)
    rows = told.select(["prompt_id", "sample_index", "reason", "detail"]).to_pylist()
    named = [{**row, "prompt_id": str(row["prompt_id"])} for row in rows]
    return {"set aside": dg.MetadataValue.json(named)} if named else {}


def _owed(excluded: pa.Table) -> dict[str, Any]:
    """What is wanted and was not given, for no reason of its own, as metadata."""
    counted = pc.sum(pc.is_in(excluded["reason"], value_set=pa.array(PASSING))).as_py()
    return {OWED: counted} if counted else {}


def _usage(engine: Engine) -> dict[str, Any]:
    """Tokens and money of this run, for engines that are asked over HTTP."""
    from pipelines.engines.openai import OpenAIEngine

    if not isinstance(engine, OpenAIEngine):
        return {}
    usage = engine.usage
    money = {"cost": round(usage.cost, 6)} if usage.cost else {}
    return {"prompt tokens": usage.prompt_tokens, "answer tokens": usage.answer_tokens, **money}
