"""Several processes that train one model: who is there, what each holds, what all agree on.

    torchrun --nproc-per-node 2 -m -- trainer pretrain ...

`ddp` keeps all weights in every process, `fsdp` (FSDP2) a part of each. Both average gradients
over processes, so a loss meant as a sum is multiplied by their number. A process alone is a world
of one, in which everything here is free. What a step computes belongs to `step`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from trainer import decoder
from trainer.layout import LAYOUTS
from trainer.packed import Pieces

Strategy = Literal["ddp", "fsdp"]
PATIENCE = timedelta(hours=12)
"""How long processes wait for each other: one makes all token ids while the others do."""


@dataclass(frozen=True)
class World:
    """This process's number among `size` of them."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def summed(self, values: list[float]) -> list[float]:
        """Every value's sum over all processes."""
        if self.size == 1:
            return values
        total = self._tensor(values)
        dist.all_reduce(total)
        return total.tolist()

    def agreed(self, value: float) -> float:
        """The first process's value, in every process."""
        if self.size == 1:
            return value
        shared = self._tensor([value])
        dist.broadcast(shared, 0)
        return float(shared)

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()

    def _tensor(self, values: list[float]) -> Tensor:
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return torch.tensor(values, dtype=torch.float64, device=device)


@contextmanager
def world() -> Iterator[World]:
    """The world that torchrun's environment describes, left again at the end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    mine = not dist.is_initialized()
    if mine:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        if mine:
            dist.destroy_process_group()


class Scores(nn.Module):
    """A network and a layout as one module, for what wraps modules: pieces in, scores out."""

    def __init__(self, network: PreTrainedModel, layout: str) -> None:
        super().__init__()
        self.network, self.layout = network, layout

    def forward(self, pieces: Pieces) -> Tensor:
        """Scores (N,) in fp32."""
        return LAYOUTS[self.layout](self.network, pieces)


def spread(scores: Scores, here: World, strategy: Strategy) -> nn.Module:
    """The module that every process calls instead of `scores`."""
    if here.size == 1:
        return scores
    if strategy == "ddp":
        return DistributedDataParallel(scores, forward_sync_buffers=False)
    for layer in decoder.layers(scores.network):
        fully_shard(layer)
    return cast(nn.Module, fully_shard(scores))


def quietly(module: nn.Module, last: bool) -> Any:
    """Where a backward pass runs: gradients travel only after a step's last one."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


def whole(value: Any) -> Any:
    """The same nested value with every distributed tensor gathered; all processes must call it."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return {key: whole(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(inner) for inner in value)
    return value


def load_optimiser(optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimiser a whole state, split as its parameters are."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    split = {
        number: {
            key: distribute_tensor(value, p.device_mesh, p.placements)
            if isinstance(p, DTensor) and value.shape == p.shape
            else value
            for key, value in state["state"].get(number, {}).items()
        }
        for number, p in enumerate(parameters)
    }
    optimiser.load_state_dict({**state, "state": {n: s for n, s in split.items() if s}})


def all_finite(network: nn.Module, here: World) -> bool:
    """Whether every weight is a finite number, in every process."""
    own = [p.to_local() if isinstance(p, DTensor) else p for p in network.parameters()]
    bad = sum(not bool(part.isfinite().all()) for part in own)
    return here.summed([float(bad)])[0] == 0


def clip_gradients(network: nn.Module, largest: float) -> float:
    """Scale gradients down to a norm of `largest`, and the norm they had."""
    norm: Any = nn.utils.clip_grad_norm_(network.parameters(), largest)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
