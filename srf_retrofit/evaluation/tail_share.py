"""How much of each head's attention the features carry, and how much they should.

In the hybrid softmax of a query `i` the features take the share

    t_i = sum_r e^{a_ir} z_r / (sum_{j in E(i)} e^{s_ij} + sum_r e^{a_ir} z_r)

of the normaliser; exact attention gives the same keys `1 - sum_{j in E(i)} softmax(s_i)_j`. The first is read off the
operator itself: its output is linear in the values, so with value 1 inside the features and 0 in every exact key the
output *is* the share, whatever the features are.

Shapes: `B` rows, `H` query heads, `G` key/value heads, `R = H / G`, `L` positions, `D` head dimension, `w` window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data import TokenBlocks
from ..modeling.attention import SRFAttention, srf_attentions
from ..modeling.configuration import SRFConfig
from ..modeling.eight_bits import as_numbers
from ..modeling.ops import srf_attention
from ..modeling.state import SRFState, slots_by_head
from .scoring import evaluating


@dataclass(frozen=True)
class TailShares:
    """Mean share of the keys outside the exact ones, over rows and positions.

    Both are lists of `H` floats for each retrofitted layer, in order: `estimated` as the features have it, `exact` as
    softmax attention would, on the same queries and keys.
    """

    estimated: list[list[float]]
    exact: list[list[float]]

    def to_dict(self) -> dict[str, list[list[float]]]:
        return {"estimated": self.estimated, "exact": self.exact}


def tail_shares(model: PreTrainedModel, blocks: TokenBlocks, *, progress: bool = False) -> TailShares:
    """Share of the tail in each head's attention, in the model as it runs.

    Quadratic in the length of the blocks, in blocks of queries; meant for some thousand tokens.

    Parameters
    ----------
    model : PreTrainedModel
        With retrofitted layers.
    blocks : TokenBlocks, (N, L)
    progress : bool

    Raises
    ------
    ValueError
        When no layer is retrofitted.
    """
    layers = srf_attentions(model)
    if not layers:
        raise ValueError("the model has no retrofitted layer: retrofit it first")
    sums: dict[int, torch.Tensor] = {}

    def add(layer: SRFAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        q, k, v = layer._project(hidden_states, kwargs["position_embeddings"])
        # A gate does not matter here: there are no exact keys beside one, and all of the share is the tail's.
        config = layer.srf_config.replace(forget_gate=False)
        shares = attention_shares(q, k, layer.attn_fn.folded(), config, scaling=layer.scaling, v=v)
        sums[id(layer)] = sums.get(id(layer), 0.0) + torch.stack([x.double().sum((0, 2)) for x in shares]).cpu()

    handles = [layer.register_forward_pre_hook(add, with_kwargs=True) for layer in layers]
    try:
        with evaluating(model):
            rows = blocks.blocks.split(1)
            for ids in tqdm(rows, desc="share of the tail", unit="row", disable=not progress, leave=False):
                model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    means = [(sums[id(layer)] / blocks.num_tokens).tolist() for layer in layers]
    return TailShares([estimated for estimated, _ in means], [exact for _, exact in means])


@torch.no_grad()
def attention_shares(
    q: torch.Tensor, k: torch.Tensor, maps: Any, config: SRFConfig, *, scaling: float, v: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of the keys outside the exact ones, of one layer.

    Parameters
    ----------
    q : (B, H, L, D); k : (B, G, L, D)
        After rotary embedding, unscaled.
    maps, config, scaling
        As in `modeling.ops.srf_attention`.
    v : like `k`, optional
        Needed where slots go by foresight, which looks at values; shares depend on them in no other way.

    Returns
    -------
    estimated, exact : (B, H, L), float32 or wider
        Of the features, and of exact softmax attention.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide), k.to(wide)
    if config.is_pure:
        return _pure_shares(q, k, maps, config, scaling)
    b, _, length, d = q.shape
    groups = k.shape[1]
    state = SRFState.empty(config, b, groups, d, dtype=wide, device=q.device)
    values = torch.zeros_like(k) if v is None else v.to(wide)
    estimated, exact = [], []
    w = config.window
    for start in range(0, length, w):
        at = slice(start, min(start + w, length))
        # Every feature's mean value is set to 1 again before each block, and to 0: the difference is the share.
        exact.append(1 - _exact_mass(q[:, :, at], k, state, config, start, scaling))
        # A block of one token would take the one-token step, which is as exact.
        found = []
        for mean in (torch.ones_like(state.kv_mean), torch.zeros_like(state.kv_mean)):
            o, after = srf_attention(
                q[:, :, at], k[:, :, at], values[:, :, at], maps, config, scaling=scaling,
                initial_state=state._replace(kv_mean=mean), output_final_state=True, backend="torch",
            )  # fmt: skip
            found.append(o[..., 0])
        assert after is not None
        state = after
        estimated.append(found[0] - found[1])
    return torch.cat(estimated, 2), torch.cat(exact, 2).clamp_min(0)


def _exact_mass(
    q: torch.Tensor, k: torch.Tensor, state: SRFState, config: SRFConfig, start: int, scaling: float
) -> torch.Tensor:
    """(B, H, w): probability that softmax over all earlier keys gives to the exact ones of a block of queries.

    q : (B, H, w, D), the block at `start`; k : (B, G, L, D); state : before the block.
    """
    b, heads, count, d = q.shape
    g = k.shape[1]
    end = start + count
    query = torch.arange(start, end, device=q.device)
    key = torch.arange(end, device=q.device)
    grouped = q.reshape(b, g, heads // g * count, d) * scaling
    logits = (grouped @ k[:, :, :end].mT).view(b, g, heads // g, count, end)
    logits = logits.masked_fill(key > query.unsqueeze(-1), float("-inf"))
    near = (key < config.sinks) | (key >= max(start - config.window, 0))
    parts = [logits.masked_fill(~near, float("-inf"))]
    if config.retained:
        slots = config.slots(g)
        kept = (grouped @ slots_by_head(as_numbers(state.retained_key, q.dtype), slots).mT).view(
            b, g, heads // g, count, -1
        )
        used = slots_by_head(state.retained_priority, slots, float("-inf")) > float("-inf")
        parts.append(kept.masked_fill(~used[:, :, None, None], float("-inf")))
    whole = logits.logsumexp(-1)
    return (torch.cat(parts, -1).logsumexp(-1) - whole).exp().reshape(b, heads, count)


def _pure_shares(
    q: torch.Tensor, k: torch.Tensor, maps: Any, config: SRFConfig, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Without a window the exact keys are the sinks alone, and each key's value says which it is."""
    outside = (torch.arange(k.shape[2], device=k.device) >= config.sinks).to(k.dtype)
    v = outside.view(1, 1, -1, 1).expand(k.shape).contiguous()
    estimated, _ = srf_attention(q, k, v, maps, config, scaling=scaling, backend="torch")
    b, heads, length, d = q.shape
    g = k.shape[1]
    exact = []
    for rows, place in zip(q.split(256, 2), torch.arange(length, device=q.device).split(256), strict=True):
        logits = (rows.reshape(b, g, -1, d) * scaling @ k.mT).view(b, heads, len(place), length)
        hidden = torch.arange(length, device=q.device) > place.unsqueeze(-1)
        exact.append((logits.masked_fill(hidden, float("-inf")).softmax(-1) * outside).sum(-1))
    return estimated[..., 0], torch.cat(exact, 2)
