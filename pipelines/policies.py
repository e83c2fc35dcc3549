"""What a policy is: the pool file and the `policies` table.

What a folder of weights holds is in `weights.py`, how a policy is asked for an answer in
`engines/`, and what it answers in `rollouts.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from pipelines import ids, prompts, schemas
from pipelines.engines.options import OpenAIOptions, VllmOptions
from pipelines.errors import ConfigError, PolicyUnavailableError
from pipelines.settings import Settings, load_yaml, parse
from pipelines.watch import Watch
from pipelines.weights import fingerprint

SLOT = "{prompt}"
SYSTEM = "{system}"
UNVERIFIED = "unverified"


class PoolPolicy(Settings):
    """One policy of a pool file.

    `weights` is a folder under `POLAR_HOME/policies` (or an absolute one) whose content is the
    policy's identity; with a `revision` it is the name of a model on a hub or at a vendor, and
    both together are the identity. `interface` says what a server is sent: the rendered template
    as it is (completions), or as a user's message that the model's own chat template wraps (chat).
    """

    name: str = Field(min_length=1)
    policy_group: str = Field(default="", description="default: name")
    family: str = Field(default="", description="default: policy_group")
    kind: Literal["base", "chat", "checkpoint", "api"]
    engine: Literal["local", "vllm", "openai"] = "local"
    interface: Literal["completions", "chat"] | None = Field(
        default=None, description="default: chat for kinds chat and api, but for engine local"
    )
    vllm: VllmOptions | None = Field(default=None, description="default: the pool's")
    openai: OpenAIOptions | None = Field(default=None, description="default: the pool's")
    weights: str = Field(min_length=1)
    revision: str | None = None
    parent: str | None = None
    lineage_step: int | None = Field(default=None, ge=0)
    template: str = SLOT
    licence: str | None = Field(default=None, description="or `unverified`")
    licence_source: str | None = Field(default=None, description="where that is said")
    parameters: float | None = Field(default=None, gt=0, description="of the model, for `plan`")
    split: Literal["train", "test"] | None = None

    @field_validator("template")
    @classmethod
    def _one_slot(cls, template: str) -> str:
        if template.count(SLOT) != 1:
            msg = f"must hold the slot {SLOT} exactly once"
            raise ValueError(msg)
        return template

    @model_validator(mode="after")
    def _identity(self) -> PoolPolicy:
        if self.engine == "local" and self.revision:
            msg = f"policy {self.name!r}: local weights are known by content; remove revision"
            raise ValueError(msg)
        if self.engine == "openai" and not self.revision:
            msg = f"policy {self.name!r}: engine openai needs a revision, for its identity"
            raise ValueError(msg)
        if self.engine == "local" and self.interface == "chat":
            msg = f"policy {self.name!r}: engine local has no interface chat; write a template"
            raise ValueError(msg)
        for name in ("vllm", "openai"):
            if getattr(self, name) is not None and self.engine != name:
                msg = (
                    f"policy {self.name!r} has a section {name!r} and engine {self.engine}; "
                    f"say engine: {name}, or remove the section"
                )
                raise ValueError(msg)
        return self

    @property
    def chat(self) -> bool:
        """Whether a server wraps the prompt in the model's own chat template."""
        if self.interface is None:
            return self.engine != "local" and self.kind in ("chat", "api")
        return self.interface == "chat"

    @property
    def group(self) -> str:
        """The policy group: the policy's own name where none is given."""
        return self.policy_group or self.name

    @property
    def on_hub(self) -> bool:
        """Whether the weights are a hub's revision."""
        return self.engine == "vllm" and self.revision is not None

    def folder(self, home: Path) -> Path:
        """Where local weights lie."""
        return home / "policies" / self.weights


class Pool(Settings):
    """A pool file: a source name, its policies, and the training recipes of embedded ones.

    The sections `vllm` and `openai` hold for policies of that engine that have none of their own.
    """

    source: str = Field(min_length=1)
    policies: tuple[PoolPolicy, ...] = ()
    vllm: VllmOptions = VllmOptions()
    openai: OpenAIOptions | None = None
    embedded: dict[str, Any] | None = None
    watch: tuple[Watch, ...] = ()
    require_licence: bool = Field(default=False, description="policies without one do not answer")

    @model_validator(mode="after")
    def _consistent(self) -> Pool:
        if not self.policies and not self.watch:
            msg = "names no `policies` and watches no run for checkpoints; give some"
            raise ValueError(msg)
        positions: dict[str, int] = {}
        sides: dict[str, PoolPolicy] = {}
        for position, policy in enumerate(self.policies, 1):
            if policy.name in positions:
                msg = (
                    f"policies {positions[policy.name]} and {position} are both named "
                    f"{policy.name!r}; give each its own name"
                )
                raise ValueError(msg)
            positions[policy.name] = position
            if policy.split:
                other = sides.setdefault(policy.group, policy)
                if other.split != policy.split:
                    msg = (
                        f"policy group {policy.group!r} is on two sides: {other.name!r} says "
                        f"{other.split}, {policy.name!r} says {policy.split}; a group has one"
                    )
                    raise ValueError(msg)
        for policy in self.policies:
            if policy.parent is not None and policy.parent not in positions:
                msg = (
                    f"policy {policy.name!r} has parent {policy.parent!r}, which is not in the "
                    f"pool; named here: {', '.join(positions)}"
                )
                raise ValueError(msg)
            if policy.engine == "openai" and not (policy.openai or self.openai):
                msg = (
                    f"policy {policy.name!r} has engine openai and nothing says where it answers; "
                    "write a section `openai` with base_url, there or in the pool"
                )
                raise ValueError(msg)
        for watch in self.watch:
            if watch.parent is not None and watch.parent not in positions:
                msg = f"watch {watch.name!r} has parent {watch.parent!r}, which is not in the pool"
                raise ValueError(msg)
        return self

    def with_checkpoints(self, home: Path) -> Pool:
        """The pool with the whole checkpoints of the runs that it watches.

        Raises:
            ConfigError: a checkpoint has the name of another policy, or an unknown parent.
        """
        found = [entry for watch in self.watch for entry in watch.policies(home)]
        if not found:
            return self
        said = self.model_dump()
        said["policies"] = [*said["policies"], *found]
        return parse(said, Pool, f"pool {self.source!r} with checkpoints")

    def side(self, policy: PoolPolicy, settings: prompts.SplitSettings) -> str:
        """The side that a member of the policy's group names, else the group's hash side."""
        for member in self.policies:
            if member.group == policy.group and member.split:
                return member.split
        return prompts.side("policy", policy.group, settings)


def render(template: str, prompt: str, system: str | None = None) -> str:
    """The model's input for a prompt; braces elsewhere in template or prompt stay as they are.

    Args:
        template: of a policy; it may hold a place `{system}`.
        prompt: the user's words.
        system: the turn before them; nothing stands in its place where there is none.

    >>> render("Q: {prompt} A:", "2+2?")
    'Q: 2+2? A:'
    >>> render("{system} Q: {prompt} A:", "2+2?", "Be brief.")
    'Be brief. Q: 2+2? A:'
    """
    before, after = (part.replace(SYSTEM, system or "") for part in template.split(SLOT))
    return before + prompt + after


def load_pool(path: Path) -> Pool:
    """Read a pool file.

    Raises:
        ConfigError: an unknown key (the nearest valid one is named), two policies of one name, an
            unknown parent, a template without `{prompt}`, one policy group on two sides.
    """
    return load_yaml(path, Pool)


def _demand_licence(pool: Pool, policy: PoolPolicy) -> None:
    if pool.require_licence and policy.licence in (None, "", UNVERIFIED):
        msg = (
            f"pool {pool.source!r} demands a licence (require_licence) and policy {policy.name!r} "
            f"has {policy.licence or 'none'}; find out, and write it and where it is said"
        )
        raise PolicyUnavailableError(msg)


def revision_of(policy: PoolPolicy, home: Path) -> str:
    """What tells the policy's weights from all others: their fingerprint, or `name@revision`.

    Raises:
        PolicyUnavailableError: local weights are missing.
    """
    if policy.revision:
        return f"{policy.weights}@{policy.revision}"
    return fingerprint(policy.folder(home))


def policy_id(revision: str, template: str, *, chat: bool = False) -> bytes:
    """The id of a policy of the pool: weights (or a revision of them) and a template.

    The model's own chat template around that one makes another policy.
    """
    return ids.content_id("policy", revision, template, *(["chat"] if chat else []))


def recorded_policy_id(source: str, name: str) -> bytes:
    """The id of a policy known only by what a source calls it."""
    return ids.content_id("policy", "recorded", source, name)


def policies_table(
    pool: Pool, home: Path, split: prompts.SplitSettings
) -> tuple[pa.Table, dict[str, str]]:
    """The `policies` rows of those that can answer, and the others' names with the reason.

    A parent that is itself unavailable is null.

    Raises:
        ConfigError: two policies have the same weights and template, so they are one policy.
    """
    revisions: dict[str, str] = {}
    unavailable: dict[str, str] = {}
    for policy in pool.policies:
        try:
            _demand_licence(pool, policy)
            revisions[policy.name] = revision_of(policy, home)
        except (PolicyUnavailableError, OSError) as error:
            unavailable[policy.name] = str(error)
    present = [policy for policy in pool.policies if policy.name in revisions]
    id_of = {p.name: policy_id(revisions[p.name], p.template, chat=p.chat) for p in present}
    first: dict[bytes, str] = {}
    for name, key in id_of.items():
        if first.setdefault(key, name) != name:
            msg = (
                f"policies {first[key]!r} and {name!r} have the same weights and template: they "
                "are one policy; remove one of them"
            )
            raise ConfigError(msg)
    rows = [
        {
            "policy_id": id_of[p.name],
            "name": p.name,
            "policy_group": p.group,
            "family": p.family or p.group,
            "kind": p.kind,
            "parent": id_of.get(p.parent) if p.parent else None,
            "lineage_step": p.lineage_step,
            "source": pool.source,
            "revision": revisions[p.name],
            "template": p.template,
            "engine": p.engine,
            "licence": p.licence,
            "split": pool.side(p, split),
        }
        for p in present
    ]
    return pa.Table.from_pylist(rows, schema=schemas.POLICIES.schema), unavailable


def moved(earlier: pa.Table, now: pa.Table) -> pa.Table:
    """Policies that left the pool while their group stayed and changed sides, on its new side.

    Args:
        earlier: policies of the pool as they are registered.
        now: those that the pool has now.
    """
    present = set(ids.storage(now["policy_id"]).to_pylist())
    sides = dict(zip(now["policy_group"].to_pylist(), now["split"].to_pylist(), strict=True))
    rows = [
        row | {"split": sides[row["policy_group"]]}
        for row in earlier.to_pylist()
        if ids.raw(row["policy_id"]) not in present
        and sides.get(row["policy_group"], row["split"]) != row["split"]
    ]
    return pa.Table.from_pylist(rows, schema=schemas.POLICIES.schema)
