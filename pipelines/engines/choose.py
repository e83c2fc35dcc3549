"""The engine of a policy, as its pool file says. How each answers is in its own room."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pipelines.engines.base import Engine
from pipelines.engines.options import OpenAIOptions, VllmOptions
from pipelines.errors import PolicyUnavailableError
from pipelines.policies import Pool, PoolPolicy

Instead = Literal["local", "vllm"]


def engine_of(policy: PoolPolicy, instead: Instead | None) -> str:
    """The name of the engine that answers for a policy; `instead` is for folders of weights."""
    return instead if instead and policy.revision is None else policy.engine


def open_engine(
    policy: PoolPolicy,
    pool: Pool,
    home: Path,
    *,
    policy_id: str,
    threads: int = 1,
    instead: Instead | None = None,
) -> Engine:
    """The engine that answers for a policy; a server starts when there is something to ask.

    Args:
        policy: of the pool.
        pool: whose sections hold where the policy has none of its own.
        home: under which weights, logs and accounts lie.
        policy_id: written form, the name of its account.
        threads: of the local engine.
        instead: another engine for policies that are folders of weights.

    Raises:
        PolicyUnavailableError: weights, key or vLLM are missing, or it cannot fit into memory.
    """
    name = engine_of(policy, instead)
    if name == "vllm":
        return _vllm(policy, policy.vllm or pool.vllm, home)
    if name == "openai":
        options = policy.openai or pool.openai
        assert options is not None  # noqa: S101 - the pool file was checked for it
        return _openai(policy, options, home / "spending" / f"{policy_id}.jsonl")
    from pipelines.engines.local import LocalEngine

    return LocalEngine(policy.folder(home), threads=threads)


def _vllm(policy: PoolPolicy, options: VllmOptions, home: Path) -> Engine:
    from pipelines.engines import memory, vllm_server, wire
    from pipelines.engines.asking import Endpoint
    from pipelines.engines.openai import OpenAIEngine

    python = vllm_server.interpreter()
    model, opening, note = policy.weights, None, ""
    extra = dict(wire.NEUTRAL)
    if policy.revision is None:
        folder = policy.folder(home)
        if not (folder / "config.json").is_file():
            msg = f"{folder}: no policy there (config.json is missing); correct `weights`"
            raise PolicyUnavailableError(msg)
        model, note = str(folder.absolute()), memory.require(folder, options)
        if not policy.chat:  # as the local engine does, whatever the tokenizer would add
            opening = vllm_server.beginning_of_text(folder)
            extra["add_special_tokens"] = False
    server = vllm_server.Server(
        lambda port: vllm_server.command(model, policy.revision, options, python=python, port=port),
        home / "logs" / "vllm" / f"{policy.name.replace('/', '_')}.log",
        environment=vllm_server.environment(options, offline=policy.revision is None),
        start_timeout=options.start_timeout,
        memory_note=note,
    )
    endpoint = Endpoint(model=vllm_server.MODEL, chat=policy.chat, extra=extra, opening=opening)
    return OpenAIEngine(endpoint, options, name="vllm", server=server)


def _openai(policy: PoolPolicy, options: OpenAIOptions, account: Path) -> Engine:
    from pipelines.engines.asking import Endpoint
    from pipelines.engines.openai import OpenAIEngine
    from pipelines.engines.spending import Ledger

    endpoint = Endpoint(
        model=policy.weights,
        chat=policy.chat,
        url=options.base_url,
        key=_key(policy, options),
        takes=options.takes,
        limit_name=options.limit_name,
    )
    return OpenAIEngine(endpoint, options, ledger=Ledger(account, options))


def _key(policy: PoolPolicy, options: OpenAIOptions) -> str | None:
    """The key, from the environment; no message ever holds it."""
    name = options.api_key_env
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        msg = f"policy {policy.name!r}: the environment variable {name} holds no key; set it"
        raise PolicyUnavailableError(msg)
    if not (key.isascii() and key.isprintable()) or " " in key:
        msg = f"policy {policy.name!r}: what {name} holds cannot be a key; set it again"
        raise PolicyUnavailableError(msg)
    return key
