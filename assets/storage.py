"""Where Dagster keeps its own records: under POLAR_HOME, whoever starts it.

`dagster.yaml` names these classes because a plain path there cannot have a default. Nothing else
belongs here.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from dagster._core.storage.compute_log_manager import CapturedLogContext
from dagster._core.storage.local_compute_log_manager import LocalComputeLogManager
from dagster._core.storage.root import LocalArtifactStorage
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from dagster._serdes import ConfigurableClassData

from assets.home import polar_home

# With telemetry off the web server still makes empty folders for it where dagster.yaml lies, unless
# this says no: it opens the storage before it makes them.
os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "1")


POOL_LIMITS = {"gpu": 1}  # places of a Dagster pool; other pools have dagster.yaml's default


class HomeStorage(DagsterSqliteStorage):
    """Runs, events and schedules in SQLite files of POLAR_HOME/dagster."""

    @classmethod
    def config_type(cls) -> Any:
        """No configuration: the place follows POLAR_HOME."""
        return {}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData, config_value: Any) -> Any:
        """Open (and make, the first time) the storage; pool limits that were set are kept."""
        storage = cls.from_local(str(polar_home() / "dagster"), inst_data=inst_data)
        events = storage.event_log_storage
        known = {limit.name for limit in events.get_pool_limits()}
        for pool in POOL_LIMITS.keys() - known:
            events.set_concurrency_slots(pool, POOL_LIMITS[pool])
        return storage


class HomeComputeLogs(LocalComputeLogManager):
    """Output of steps in POLAR_HOME/dagster/logs."""

    @classmethod
    def config_type(cls) -> Any:
        """No configuration: the place follows POLAR_HOME."""
        return {}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Any) -> Any:
        """Open the folder."""
        return cls(base_dir=str(polar_home() / "dagster" / "logs"), inst_data=inst_data)

    @contextmanager
    def capture_logs(self, log_key: Sequence[str]) -> Iterator[CapturedLogContext]:
        """Capture; its processes, which end with the capture, do not hear Ctrl-C themselves.

        They would answer it with tracebacks. A signal mask is inherited, so it is set while they
        start.
        """
        with ExitStack() as capture:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                context = capture.enter_context(super().capture_logs(log_key))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            yield context


class HomeArtifacts(LocalArtifactStorage):
    """Values that Dagster itself stores, in POLAR_HOME/dagster/storage."""

    @classmethod
    def config_type(cls) -> Any:
        """No configuration: the place follows POLAR_HOME."""
        return {}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Any) -> Any:
        """Open the folder."""
        return cls(base_dir=str(polar_home() / "dagster"), inst_data=inst_data)
