"""What Dagster loads: the assets, checks, job and schedule of one configuration.

`build_definitions(workspace)` returns fresh definitions, for tests and for `polar run`; plain
`dagster dev` reads POLAR_HOME, POLAR_CONFIG and POLAR_DATA through `defs`.
"""

from __future__ import annotations

import warnings

import dagster as dg

from assets import corpus, evaluation, maintenance, pool, scaling, training
from assets.automation import new_checkpoints, refresh_corpus, refresh_schedule
from assets.checks import all_checks
from assets.trajectories import trajectories_of
from assets.workspace import Workspace

# Dagster itself passes this parameter whenever it binds resources to a sensor.
warnings.filterwarnings("ignore", message="Parameter `owners`", category=dg.BetaWarning)


def build_definitions(workspace: Workspace) -> dg.Definitions:
    """The definitions of a workspace's configuration."""
    if workspace.config.is_recorded:
        first = [corpus.recorded]
    else:
        first = [*pool.ASSETS, trajectories_of(workspace), *corpus.POOL_ASSETS]
    return dg.Definitions(
        assets=[
            *first,
            *corpus.ASSETS,
            *training.ASSETS,
            *evaluation.ASSETS,
            *scaling.ASSETS,
            *maintenance.ASSETS,
        ],
        asset_checks=all_checks(),
        jobs=[refresh_corpus],
        schedules=[refresh_schedule],
        sensors=[new_checkpoints],
        resources={"workspace": dg.ResourceDefinition.hardcoded_resource(workspace)},
        executor=dg.in_process_executor,
    )


@dg.definitions
def defs() -> dg.Definitions:
    """The definitions of the environment's home and configuration."""
    return build_definitions(Workspace.load())
