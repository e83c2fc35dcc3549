"""What a pool file may say of how a policy is asked: a section for vLLM, one for other endpoints.

Only the settings are here, apart from the engines, so that a change of their code does not make
the pool's policies stale. What an endpoint's key is never stands in a file: only the name of the
environment variable that holds it.
"""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from pipelines.settings import Settings

Parameter = Literal["top_k", "seed", "n"]


class AskOptions(Settings):
    """What holds for every server that is asked over HTTP."""

    concurrency: int = Field(default=32, ge=1, description="requests under way at a time")
    samples_per_request: int = Field(
        default=16, ge=1, description="most samples of one prompt asked for in one request"
    )
    request_timeout: float = Field(default=600.0, gt=0, description="seconds for one request")
    patience: float = Field(
        default=900.0, gt=0, description="seconds without any answer after which it is given up"
    )

    @model_validator(mode="after")
    def _patience_outlasts_a_request(self) -> AskOptions:
        if self.patience < self.request_timeout:
            msg = (
                f"patience {self.patience:g} is shorter than request_timeout "
                f"{self.request_timeout:g}: one slow request would end the policy; raise patience"
            )
            raise ValueError(msg)
        return self


class VllmOptions(AskOptions):
    """A vLLM server that is started for the policy and stopped after it."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: cuda where nvidia-smi finds a GPU, else cpu"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = Field(
        default=None, gt=0, description="tokens of prompt and answer; default: the model's context"
    )
    tensor_parallel: int = Field(default=1, ge=1, description="GPUs that share one model")
    gpu_memory: float = Field(default=0.9, gt=0, le=1, description="share of each GPU's memory")
    kv_cache_gib: int = Field(default=2, ge=1, description="keys and values on a CPU, GiB")
    start_timeout: float = Field(default=900.0, gt=0, description="seconds until it is healthy")
    arguments: tuple[str, ...] = Field(
        default=(), description="further arguments of vLLM's server, as they are"
    )


class OpenAIOptions(AskOptions):
    """An endpoint that speaks the OpenAI protocol: a vendor's, or a server running elsewhere."""

    base_url: str = Field(description="up to and including /v1")
    api_key_env: str | None = Field(
        default=None, description="environment variable that holds the key; none: no key is sent"
    )
    takes: tuple[Parameter, ...] = Field(
        default=("top_k", "seed", "n"),
        description="what the endpoint takes beside temperature, top_p and a limit",
    )
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    price_prompt: float | None = Field(
        default=None, ge=0, description="money for a million prompt tokens"
    )
    price_answer: float | None = Field(
        default=None, ge=0, description="money for a million answer tokens"
    )
    max_cost: float | None = Field(
        default=None, ge=0, description="money that this policy may cost, all runs together"
    )
    max_tokens_in_all: int | None = Field(
        default=None, ge=0, description="tokens of prompts and answers, all runs together"
    )

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            msg = "must be an http or https address, up to and including /v1"
            raise ValueError(msg)
        if parts.username or parts.password or parts.query:
            msg = "must hold no user, password or query: a key belongs in an environment variable"
            raise ValueError(msg)
        return url.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _a_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", name):
            msg = "must be the name of an environment variable (capitals), never the key itself"
            raise ValueError(msg)
        return name

    @model_validator(mode="after")
    def _a_cap_needs_prices(self) -> OpenAIOptions:
        if self.max_cost is not None and (self.price_prompt is None or self.price_answer is None):
            msg = "max_cost needs price_prompt and price_answer (for a million tokens each)"
            raise ValueError(msg)
        return self
