"""A transformers decoder layer over a packed row, with less around its matrix products.

The layer's own modules hold the weights and do the products, so adapters, checkpointing and
sharding see what they know; attention, norms and residuals are ours. In the last layer only each
candidate's last id goes on after the keys and values, for nothing else is read.

`ready` says for which networks this holds; all others run as transformers wrote them, through
`layout.separate` or FlexAttention. Attention itself belongs to `attention`.

Shapes: T ids of the row, N candidates, E width of the network.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.attention import grouped_attention
from trainer.packed import Row

LAYERS = {
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
    "Gemma3DecoderLayer",
}
"""Layers whose parts and order are those of `_layer`; each is tested or alike to one that is."""

KINDS = {"full_attention", "sliding_attention"}


def ready(network: PreTrainedModel) -> bool:
    """Whether every layer is one of `LAYERS` and does nothing that `_layer` leaves out."""
    config = network.config
    return (
        hasattr(network.base_model, "layers")
        and all(
            LAYERS & {kind.__name__ for kind in type(layer).__mro__} for layer in layers(network)
        )
        and not getattr(config, "attention_dropout", 0.0)
        and not getattr(config, "attn_logit_softcapping", None)
        and not getattr(config, "use_bidirectional_attention", False)
        and set(getattr(config, "layer_types", None) or ()) <= KINDS
    )


def windows(config: Any) -> list[int | None]:
    """Per layer the positions that it sees, its own included; None for all."""
    window = getattr(config, "sliding_window", None)
    kinds = (
        getattr(config, "layer_types", None)
        or ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    )
    return [window if kind == "sliding_attention" else None for kind in kinds]


def head_width(config: Any) -> int:
    """Elements of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def last_hidden(network: PreTrainedModel, row: Row) -> Tensor:
    """The final hidden states (N, E) of the candidates' last ids."""
    _install(network)
    unused_mask = torch.empty(1, 1, 1, 1, device=row.ids.device)  # or one would be made
    hidden = network.base_model(
        input_ids=row.ids,
        position_ids=row.positions,
        attention_mask=unused_mask,
        use_cache=False,
        row=row,
    ).last_hidden_state
    return hidden[0]


def layers(network: PreTrainedModel) -> nn.ModuleList:
    """The network's decoder layers, first to last, whatever its authors call them."""
    lists = (part for part in network.base_model.modules() if isinstance(part, nn.ModuleList))
    return next(part for part in lists if len(part) == network.config.num_hidden_layers)


def _install(network: PreTrainedModel) -> None:
    """Let every layer take a `row`; without one it does what it did.

    It stays, for a checkpointed layer runs again in the backward pass.
    """
    seen = windows(network.config)
    for number, (layer, window) in enumerate(zip(layers(network), seen, strict=True), 1):
        if "forward" not in vars(layer):
            layer.forward = partial(_forward, layer, layer.forward, window, number == len(seen))


def _forward(
    layer: Any,
    original: Any,
    window: int | None,
    last: bool,
    hidden: Tensor,
    *,
    row: Row | None = None,
    **kwargs: Any,
) -> Tensor:
    if row is None:
        return original(hidden, **kwargs)
    return _layer(layer, hidden, row, kwargs["position_embeddings"], window, last)


def _layer(
    layer: Any,
    hidden: Tensor,
    row: Row,
    rotary: tuple[Tensor, Tensor],
    window: int | None,
    last: bool,
) -> Tensor:
    """One pre-norm decoder layer; (1, T, E) in, (1, T, E) out, or (1, N, E) from the last."""
    inner = layer.self_attn
    normed = norm(layer.input_layernorm, hidden)
    asking, residual = normed, hidden
    if last:
        asking, residual = normed[:, row.last], hidden[:, row.last]
    query, key, value = (
        project(x).view(1, x.shape[1], -1, inner.head_dim)
        for project, x in (
            (inner.q_proj, asking),
            (inner.k_proj, normed),
            (inner.v_proj, normed),
        )
    )
    if hasattr(inner, "q_norm"):
        query, key = norm(inner.q_norm, query), norm(inner.k_norm, key)
    read = grouped_attention(
        query,
        key,
        value,
        rotary,
        row,
        scale=inner.scaling,
        window=window,
        only_last=last,
    )
    read = inner.o_proj(read)
    if hasattr(layer, "pre_feedforward_layernorm"):  # norms on both sides of each part
        hidden = residual + norm(layer.post_attention_layernorm, read)
        fed = layer.mlp(norm(layer.pre_feedforward_layernorm, hidden))
        return hidden + norm(layer.post_feedforward_layernorm, fed)
    hidden = residual + read
    return hidden + layer.mlp(norm(layer.post_attention_layernorm, hidden))


def norm(module: Any, x: Tensor) -> Tensor:
    """RMSNorm of the last dimension, in fp32, given out in the precision the products take."""
    weight = module.weight
    zero_centred = hasattr(module, "eps")  # Gemma's weights are distances from one
    epsilon = module.eps if zero_centred else module.variance_epsilon
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return _Norm.apply(x, 1 + weight if zero_centred else weight, epsilon, dtype)


class _Norm(torch.autograd.Function):
    """RMSNorm with half the passes over memory that autograd's makes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        """As `norm`."""
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = scale.div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(wide * scale, weight, out=torch.empty_like(wide, dtype=dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and weight."""
        x, weight, scale = ctx.saved_tensors
        grad = grads[0].float()
        unit = x.float() * scale
        product = (grad * unit).view(-1, x.shape[-1])
        along = product.mv(weight.float()).div_(x.shape[-1]).view_as(scale)
        d_x = (grad * weight).sub_(unit.mul_(along)).mul_(scale)
        return d_x.to(x.dtype), product.sum(0).to(weight.dtype), None, None
