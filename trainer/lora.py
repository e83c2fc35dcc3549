"""Low-rank adapters (peft) for backbones too large to train whole: only they and the head learn.

The network keeps its class and its names, peft puts the adapters inside its linear layers. What is
saved is merged: a plain checkpoint that loads without peft. The adapters alone may lie beside it,
in peft's own format.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from trainer.errors import TrainerError
from trainer.settings import LoraSettings

HEAD = "score"
FOLDER = "adapters"
_NAME = "default"


def attach(
    network: PreTrainedModel,
    settings: LoraSettings,
    *,
    seed: int = 0,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Freeze the network but for its head, and put adapters into its linear layers.

    Args:
        network: changed in place; its scores stay what they are until a step is taken.
        settings: rank, scale, dropout and targets.
        seed: of the adapters' first values.
        state: what `weights` gave, to go on from.

    Raises:
        TrainerError: no linear layer of the network has one of the target names.
    """
    from peft import inject_adapter_in_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(_config(settings), network, _NAME)
        except ValueError as error:
            msg = f"lora.targets {settings.targets!r} do not fit the network: {error}"
            raise TrainerError(msg) from error
    network.get_submodule(HEAD).requires_grad_(True)
    if state is not None:
        network.load_state_dict(dict(state), strict=False)


def weights(network: PreTrainedModel) -> dict[str, Tensor]:
    """All that `attach` lets learn, by name: adapters and head."""
    return {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}


def merged(network: PreTrainedModel) -> dict[str, Tensor] | None:
    """The state of the same network without adapters, or None if there are none in it."""
    if getattr(network, "peft_config", None) is None:
        return None
    from peft.tuners.lora import LoraLayer

    adapted = {name: m for name, m in network.named_modules() if isinstance(m, LoraLayer)}
    state = {}
    for name, tensor in network.state_dict().items():
        owner, inside, rest = name.partition(".base_layer.")
        if inside:
            module: Any = adapted[owner]
            delta = module.get_delta_weight(_NAME) if rest == "weight" else 0
            state[f"{owner}.{rest}"] = (tensor + delta).detach()
        elif not any(name.startswith(f"{owner}.lora_") for owner in adapted):
            state[name] = tensor
    return state


def save(network: PreTrainedModel, settings: LoraSettings, start: Path, folder: Path) -> None:
    """Write adapters and head in peft's format, to be loaded onto the checkpoint `start`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(settings)
    config.modules_to_save, config.base_model_name_or_path = [HEAD], str(start)
    config.inference_mode = True
    state = {
        f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": tensor.contiguous().cpu()
        for name, tensor in weights(network).items()
    }
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def _config(settings: LoraSettings) -> Any:
    from peft import LoraConfig, TaskType

    named = settings.targets != ("all-linear",)
    return LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets) if named else "all-linear",
        exclude_modules=[HEAD],
    )
