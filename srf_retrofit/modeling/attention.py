"""Softmax attention layers of Transformers, taken over by random features.

A retrofitted layer *is* the layer it was (same module, same projections, a subclass of its class), plus its features
under the name `attn_fn`. Taking it over and giving it back are changes of class; no weight is copied or moved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from .cache import softmax_cache_layer, srf_cache_layer
from .configuration import SRFConfig
from .feature_map import FoldedMap
from .features import SRFFeatures
from .learned_maps import LearnedMaps, feature_module
from .ops import ABLATIONS, srf_attention
from .state import SRFState, slot_bounds

# Names under which a model passes the padding mask and the document bounds to its layers.
MASK_KEY = "srf_attention_mask"
DOCUMENTS_KEY = "srf_cu_seqlens"

Observer = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], None]


class SRFAttention(nn.Module):
    """Mixin that stands before a Transformers attention class and replaces its softmax by random features.

    Attributes
    ----------
    attn_fn : SRFFeatures or LearnedMaps
        Projection and geometry, or the learned maps; the only thing that is added to a checkpoint.
    srf_config : SRFConfig
    exact : bool
        True runs the softmax attention of the original class on the same weights (teacher mode).
    ablation : {None, "no_tail", "tail_only", "no_retained"}
        For evaluation, see `ops.srf_attention`; ignored while `exact`.
    backend : {"auto", "torch", "triton"}
        What computes the attention, see `ops.srf_attention`.
    observer : callable or None
        Called in both modes as `observer(q, k, mask)` before every attention: queries (B, H, L, D) and keys
        (B, G, L, D) after rotary embedding, unscaled, and the padding mask (B, L) or None.
    """

    attn_fn: SRFFeatures | LearnedMaps
    srf_config: SRFConfig
    exact: bool
    ablation: str | None
    backend: str = "auto"
    observer: Observer | None
    _slot_bounds: torch.Tensor | None

    # The original class's own.
    config: Any
    layer_idx: int
    head_dim: int
    num_key_value_groups: int
    scaling: float
    attention_dropout: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        self._begin(config.srf_config)

    @classmethod
    def adopt(cls, layer: nn.Module, srf_config: SRFConfig) -> SRFAttention:
        """Turn a softmax attention layer into this class, in place.

        Parameters
        ----------
        layer : nn.Module
            An instance of the class that this one extends. Its projections, hooks, dtype, device and training mode
            stay as they are.
        srf_config : SRFConfig

        Returns
        -------
        SRFAttention
            The same object.

        Raises
        ------
        TypeError, ValueError
            When the layer is of another class, or drops out attention weights. Nothing is changed then.
        """
        if type(layer) is not cls.softmax_class():
            raise TypeError(f"{cls.__name__} adopts a {cls.softmax_class().__name__}, got a {type(layer).__name__}")
        check_dropout(layer.attention_dropout)  # type: ignore[arg-type]
        layer.__class__ = cls  # type: ignore[assignment]
        assert isinstance(layer, SRFAttention)
        layer._begin(srf_config)
        return layer

    def release(self) -> nn.Module:
        """Turn this layer back into the softmax layer it extends, in place; the features are dropped."""
        del self.attn_fn
        for name in ("srf_config", "exact", "ablation", "observer", "_slot_bounds"):
            delattr(self, name)
        self.__class__ = self.softmax_class()
        return self

    @classmethod
    def softmax_class(cls) -> type[Any]:
        """The Transformers class that this one extends."""
        return cls.__mro__[cls.__mro__.index(SRFAttention) + 1]

    def _begin(self, srf_config: SRFConfig) -> None:
        check_dropout(self.attention_dropout)
        device = next(self.k_proj.parameters()).device
        num_kv_heads = self.config.num_attention_heads // self.num_key_value_groups
        self.srf_config = srf_config = srf_config.for_layer(self.layer_idx)
        self.attn_fn = feature_module(
            srf_config, self.config.num_attention_heads, num_kv_heads, self.head_dim, self.layer_idx,
            hidden_size=self.config.hidden_size, device=device,
        )  # fmt: skip
        self.attn_fn.train(self.training)
        if next(self.k_proj.parameters()).dtype == torch.float64:
            self.attn_fn.double()
        self.exact = False
        self.ablation = None
        self.observer = None
        self._slot_bounds = None

    def set_retained(self, slots: int | tuple[int, ...]) -> None:
        """Let every key/value head of this layer retain another number of keys, or each of them its own.

        A cache that the layer began before has another shape.

        Raises
        ------
        ValueError
            When a number is negative, there is none for some head, or where a layer that retains keys shall retain
            none, or the other way round.
        """
        config = self.srf_config.with_slots(slots)
        if bool(config.retained) != bool(self.srf_config.retained):
            raise ValueError(f"retained={self.srf_config.retained} cannot become {slots}: retrofit the model anew")
        config.slots(self.attn_fn.num_kv_heads)
        self.srf_config = self.attn_fn.config = config
        self._slot_bounds = None

    def use_fast_attn_(self, flag: bool) -> None:
        """The seed's switch: random features if `flag`, the original softmax attention if not."""
        self.exact = not flag

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention over (B, L, hidden); `attention_mask` is for the exact mode alone, see `MASK_KEY`."""
        mask, documents = kwargs.pop(MASK_KEY, None), kwargs.pop(DOCUMENTS_KEY, None)
        if self.exact:
            if self.observer is not None:
                q, k, _ = self._project(hidden_states, position_embeddings)
                self.observer(q, k, mask)
            if past_key_values is not None:
                softmax_cache_layer(past_key_values, self.layer_idx)
            return super().forward(  # type: ignore[misc]
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )

        q, k, v = self._project(hidden_states, position_embeddings)
        if self.observer is not None:
            self.observer(q, k, mask)
        b, length = hidden_states.shape[:2]
        log_forget = self._forget(hidden_states)
        layer, state = None, None
        if past_key_values is not None:
            layer = srf_cache_layer(past_key_values, self.layer_idx, self.srf_config)
            state = layer.begin(k, v)
            if state is not None and torch.is_grad_enabled() and q.requires_grad:
                # The cache is overwritten below, while this forward's graph still needs what it started from.
                state = SRFState(*(t.clone() for t in state))
        if documents is not None and b > 1:
            q, k, v = (x.transpose(0, 1).reshape(1, x.shape[1], b * length, x.shape[-1]) for x in (q, k, v))
            if log_forget is not None:
                log_forget = log_forget.transpose(0, 1).reshape(1, -1, b * length)
        o, final = srf_attention(
            q,
            k,
            v,
            self.folded(q.dtype),
            self.srf_config,
            scaling=self.scaling,
            attention_mask=mask,
            cu_seqlens=documents,
            log_forget=log_forget,
            initial_state=state,
            output_final_state=layer is not None,
            ablation=self.ablation,
            backend=self.backend,
            in_place=layer is not None,
        )
        if layer is not None:
            assert final is not None
            layer.store(final, length)
        if documents is not None and b > 1:
            o = o.reshape(o.shape[1], b, length, o.shape[-1]).transpose(0, 1)
        return self.o_proj(o.transpose(1, 2).reshape(b, length, -1)), None

    def folded(self, dtype: torch.dtype | None = None) -> FoldedMap:
        """Features as `ops.srf_attention` takes them, for inputs of `dtype`.

        A compiled graph reads what the last call outside of one has left, so that layers whose heads differ in their
        slots share it: where these begin is then a tensor like any other.
        """
        maps = self.attn_fn.folded(dtype)
        if not torch.compiler.is_compiling():
            slots = self.srf_config.slots(self.attn_fn.num_kv_heads)
            self._slot_bounds = slot_bounds(slots, self.attn_fn.device)
        return maps if self._slot_bounds is None else maps._replace(slot_bounds=self._slot_bounds)

    def _forget(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logarithms of the forget gate (B, G, L), if this layer has one."""
        gate = self.attn_fn.gate
        return None if gate is None else gate(hidden_states)

    def _project(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (B, H, L, D), keys and values (B, G, L, D) of this layer, of one dtype, rotary embedding applied."""
        assert position_embeddings is not None
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        # The projections are called, never read: they may be LoRA layers, or live on a disk until they are called.
        q, k = self.q_proj(hidden_states).view(shape), self.k_proj(hidden_states).view(shape)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if hasattr(self, "q_norm"):  # Qwen3
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
        # Under autocast the rotation comes out wider than the projections.
        return q.to(v.dtype), k.to(v.dtype), v


class SRFLlamaAttention(SRFAttention, LlamaAttention):  # type: ignore[misc]
    """`LlamaAttention` with random features."""


class SRFMistralAttention(SRFAttention, MistralAttention):  # type: ignore[misc]
    """`MistralAttention` with random features; for models without a sliding window."""


class SRFQwen2Attention(SRFAttention, Qwen2Attention):  # type: ignore[misc]
    """`Qwen2Attention` with random features; for its full-attention layers."""


class SRFQwen3Attention(SRFAttention, Qwen3Attention):  # type: ignore[misc]
    """`Qwen3Attention` with random features; for its full-attention layers."""


def check_dropout(probability: float | None) -> None:
    """Refuse dropout of attention weights, of which a linear form has none.

    Raises
    ------
    ValueError
        When the probability is above zero.
    """
    if probability:
        raise ValueError(
            f"attention_dropout={probability} drops entries of the attention matrix, which random features never "
            "form: set config.attention_dropout (and attention_dropout of every attention layer) to 0 first"
        )


def srf_attentions(model: nn.Module) -> list[SRFAttention]:
    """The layers of a model that carry random features, in order; empty for a softmax model."""
    return [module for module in model.modules() if isinstance(module, SRFAttention)]


def record(model: nn.Module, **changes: Any) -> None:
    """Write what retrofitted layers have become into the configurations that a checkpoint is saved with.

    Parameters
    ----------
    model : nn.Module
        With retrofitted layers, wrapped or not.
    **changes
        Fields of `SRFConfig`.

    Raises
    ------
    ValueError
        As `SRFConfig`; nothing is changed then.
    """
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel) and getattr(m.config, "srf", None)]
    for config in {id(part.config): part.config for part in parts}.values():
        config.srf = config.srf_config.replace(**changes).to_dict()


@contextlib.contextmanager
def exact_attention(model: nn.Module) -> Iterator[None]:
    """Inside this context every retrofitted layer runs its original softmax attention: the model is its own teacher.

    A cache filled on one side of the switch cannot be continued on the other; that is refused.
    """
    with _attribute(model, "exact", True):
        yield


@contextlib.contextmanager
def ablated_attention(model: nn.Module, ablation: str | None) -> Iterator[None]:
    """Inside this context every retrofitted layer leaves out a part of its attention, see `ops.srf_attention`.

    Parameters
    ----------
    model : nn.Module
    ablation : {None, "no_tail", "tail_only", "no_retained"}

    Raises
    ------
    ValueError
        For another name. The last two need forwards without a cache (`use_cache=False`).
    """
    if ablation not in ABLATIONS:
        raise ValueError(f"ablation must be one of {ABLATIONS}, got {ablation!r}")
    with _attribute(model, "ablation", ablation):
        yield


@contextlib.contextmanager
def _attribute(model: nn.Module, name: str, value: Any) -> Iterator[None]:
    layers = srf_attentions(model)
    before = [getattr(layer, name) for layer in layers]
    for layer in layers:
        setattr(layer, name, value)
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            setattr(layer, name, old)
