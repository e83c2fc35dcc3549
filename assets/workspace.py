"""What every asset works with: the home folder, the configuration, and where each thing lies.

Paths and openings only; what the configuration may say is in `config.py`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from assets.config import RunConfig, load_config
from assets.home import PROJECT, polar_home
from assets.progress import Progress
from pipelines.attach import CATALOG
from pipelines.embedded import EmbeddedPool
from pipelines.errors import ConfigError
from pipelines.lake import Lake
from pipelines.policies import Pool, load_pool, policies_table
from pipelines.prompt_sources import Places
from pipelines.settings import load_yaml, parse
from pipelines.watch import Watch
from trainer.scaling import ScalingPlan

DEFAULT_CONFIG = PROJECT / "configs" / "demo.yaml"


@dataclass(kw_only=True)
class Workspace:
    """A home, a configuration and, for recorded trajectories, the folder of data."""

    home: Path
    config: RunConfig
    config_path: Path
    data: Path | None = None
    listener: Progress | None = field(default=None, repr=False)
    has_turn: bool = field(default=False, repr=False)  # see `turns`
    _reader: Lake | None = field(default=None, repr=False)
    _policies: tuple[Any, pa.Table, dict[str, str]] | None = field(default=None, repr=False)

    @classmethod
    def load(
        cls, config: Path | None = None, data: Path | None = None, home: Path | None = None
    ) -> Workspace:
        """From arguments, else from POLAR_CONFIG, POLAR_DATA and POLAR_HOME, else the demo.

        Raises:
            ConfigError: the configuration does not hold, or recorded data is not named.
        """
        path = config or Path(os.environ.get("POLAR_CONFIG") or DEFAULT_CONFIG)
        given = data or (Path(os.environ["POLAR_DATA"]) if os.environ.get("POLAR_DATA") else None)
        settings = load_config(path)
        if given is not None and not settings.is_recorded:
            msg = (
                f"{path} makes its own trajectories: --data belongs to a `recorded:` configuration"
            )
            raise ConfigError(msg)
        return cls(
            home=(home or polar_home()).resolve(),
            config=settings,
            config_path=path.resolve(),
            data=given.resolve() if given else None,
        )

    def require_inputs(self) -> None:
        """Read the pool file, or look for the recorded data, before anything starts.

        Raises:
            ConfigError: the pool file does not hold, or the data is not there.
        """
        if self.config.is_recorded:
            self.recorded_data()
        else:
            _ = self.embedded

    def lake(self, *, read_only: bool = False) -> Lake:
        """Open the lake of this home with the configuration's limits."""
        limits = self.config.lake
        return Lake.open(
            self.home,
            read_only=read_only,
            threads=limits.threads,
            memory_limit=limits.memory_limit,
            patience=limits.patience,
        )

    def reader(self) -> Lake | None:
        """A read-only lake kept open for many small questions; None while there is no lake.

        Each query sees what was last published. Opening costs a good part of a second.
        """
        if self._reader is None and (self.home / CATALOG).exists():
            self._reader = self.lake(read_only=True)
        return self._reader

    @property
    def pool(self) -> Pool:
        """The pool file named by the configuration, with the checkpoints that are there now.

        Raises:
            ConfigError: the configuration has no pool, or the file does not hold.
        """
        return self._pool_file.with_checkpoints(self.home)

    @property
    def pool_watches(self) -> tuple[Watch, ...]:
        """The runs whose checkpoints become policies."""
        return self._pool_file.watch

    @cached_property
    def _pool_file(self) -> Pool:
        return load_pool(self.pool_path)

    @property
    def pool_path(self) -> Path:
        """Where the pool file is.

        Raises:
            ConfigError: the configuration has no pool.
        """
        if self.config.pool is None:
            msg = f"{self.config_path}: this configuration has no policy pool"
            raise ConfigError(msg)
        return (self.config_path.parent / self.config.pool).resolve()

    @cached_property
    def scaling(self) -> ScalingPlan:
        """The plan of the asset `scaling`.

        Raises:
            ConfigError: the configuration names no plan, or the file does not hold.
        """
        if self.config.scaling is None:
            msg = f"{self.config_path} names no scaling plan; add a line `scaling: scaling.yaml`"
            raise ConfigError(msg)
        return load_yaml(self.config_path.parent / self.config.scaling, ScalingPlan)

    @cached_property
    def embedded(self) -> EmbeddedPool | None:
        """The recipes of policies that this project trains itself, where the pool has some."""
        if self.config.pool is None or self.pool.embedded is None:
            return None
        return parse(self.pool.embedded, EmbeddedPool, f"{self.config.pool}: embedded")

    def policies_now(self) -> tuple[pa.Table, dict[str, str]]:
        """The pool's policies as their weights are now, and why the others cannot answer.

        Weights are read again only where sizes or times of their files have changed.
        """
        pool = self.pool
        folders = [policy.folder(self.home) for policy in pool.policies]
        files = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())]
        files_now = [(path, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files]
        stamp = (pool, files_now)
        if self._policies is None or self._policies[0] != stamp:
            self._policies = (stamp, *policies_table(pool, self.home, self.config.split))
        return self._policies[1:]

    def recorded_data(self) -> Path:
        """The folder or file of recorded trajectories.

        Raises:
            ConfigError: none was given, or it is not there.
        """
        if self.data is None:
            msg = (
                f"{self.config_path} reads recorded trajectories: say where they are with "
                "--data FOLDER (or POLAR_DATA)"
            )
            raise ConfigError(msg)
        if not self.data.exists():
            msg = f"--data {self.data}: there is no such file or folder"
            raise ConfigError(msg)
        return self.data

    # Folders under the home. Those that belong to one configuration carry its name.
    @property
    def policies_dir(self) -> Path:
        """Weights of policies trained here."""
        return self.home / "policies"

    @property
    def staging_dir(self) -> Path:
        """Answers that were made but not yet published."""
        return self.home / "staging" / "rollouts"

    @property
    def run_lock(self) -> Path:
        """Held by whoever makes this corpus: runs that share prompts and answers take turns."""
        corpus = self.config.name if self.config.is_recorded else f"pool-{self.pool.source}"
        return self.home / "staging" / f"{corpus}.lock"

    @property
    def work_dir(self) -> Path:
        """Files between stages. What is deleted there is made again."""
        return self.home / "staging" / self.config.name

    @property
    def places(self) -> Places:
        """Where prompt files and tokenizers are looked for."""
        return Places(base=self.config_path.parent, policies=self.policies_dir)

    @property
    def dedup_index(self) -> Path:
        """What the last dedup of this configuration's answers knew, for the next one."""
        return self.work_dir / "dedup-index"

    @property
    def signatures(self) -> Path:
        """MinHash signatures of this configuration's answers, for `pairs` and `polar similar`."""
        return self.dedup_index / "signatures"

    @property
    def sources(self) -> list[str]:
        """Whose rows the stages read and replace; of recorded data, none before it is read."""
        if not self.config.is_recorded:
            return [self.pool.source]
        file = self.sources_file
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []

    @property
    def sources_file(self) -> Path:
        """The names of the sources that were found in recorded data."""
        return self.work_dir / "sources.json"

    @property
    def quarantined_file(self) -> Path:
        """The names of the files of which rows were set aside."""
        return self.work_dir / "quarantined.json"

    def groups_file(self, wrapper: str, split: str) -> Path:
        """The groups file of one wrapper (pretrain, sft) and split (train, eval)."""
        return self.home / "groups" / self.config.name / f"{wrapper}-{split}.parquet"

    def checkpoint(self, name: str) -> Path:
        """The folder of a checkpoint by the name of its asset."""
        return self.home / "checkpoints" / self.config.name / name

    @property
    def report_dir(self) -> Path:
        """The folder of the evaluation report."""
        return self.home / "reports" / self.config.name

    @property
    def scaling_dir(self) -> Path:
        """The folder of the report on scaling laws."""
        return self.report_dir / "scaling"
