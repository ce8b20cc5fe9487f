"""The recurrent state as one layer of a stock Transformers cache.

`DynamicCache` and `StaticCache` are lists of layers. An `SRFCacheLayer` takes the place of a layer that would have
stored keys and values; the layers of a hybrid that keep softmax attention keep theirs in the same object.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
)

from .configuration import SRFConfig
from .state import SRFState


class SRFCacheLayer(CacheLayerMixin):
    """Holds one layer's `SRFState`, updated in place: its tensors keep their addresses while the batch stays the same.

    Parameters
    ----------
    config : SRFConfig
    max_cache_len : int, optional
        Given in a `StaticCache`: the number of fed positions is then counted in a 0-dim tensor, so that a compiled
        step need not be compiled again, and this is the length that masks of softmax layers are made for.

    Attributes
    ----------
    state : SRFState or None
        Batch-first tensors, `None` before the first token.
    batch_size : int
        Rows of the state, once it is there.

    Notes
    -----
    `get_seq_length` counts fed positions, padding included, as Transformers expects; `state.length` counts each row's
    real tokens. The state is detached: nothing is differentiated through a cache.
    """

    supports_early_init = True
    is_croppable = False
    is_sliding = False

    def __init__(self, config: SRFConfig, max_cache_len: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.max_cache_len = max_cache_len
        self.is_compileable = max_cache_len is not None
        self.state: SRFState | None = None
        self.cumulative_length: Any = 0 if max_cache_len is None else torch.tensor(0, dtype=torch.int64)

    def __repr__(self) -> str:
        return f"SRFCacheLayer({'empty' if self.state is None else f'{self.state.nbytes()} bytes'})"

    # -- contents ----------------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the state for keys and values like these, `(B, G, any, D)`."""
        b, g, _, d = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self._hold(SRFState.empty(self.config, b, g, d, dtype=self.dtype, device=self.device))
        if isinstance(self.cumulative_length, torch.Tensor):
            self.cumulative_length = self.cumulative_length.to(self.device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.cumulative_length)
        self.is_initialized = True

    def _hold(self, state: SRFState) -> None:
        self.state = state
        self.batch_size = state.length.shape[0]
        if self.is_compileable and not torch.compiler.is_compiling():
            for tensor in state:
                torch._dynamo.mark_static_address(tensor)

    def begin(self, key_states: torch.Tensor, value_states: torch.Tensor) -> SRFState | None:
        """State to continue from with these keys and values, `(B, G, L, D)`; `None` when a prefill starts from nothing.

        An empty state is made anew if it was allocated for another batch, dtype or device.
        """
        if self.state is None:
            self.lazy_initialization(key_states, value_states)
        elif not torch.compiler.is_compiling() and (self.batch_size, self.dtype, self.device) != (
            key_states.shape[0],
            key_states.dtype,
            key_states.device,
        ):
            if not self.is_empty:
                raise ValueError(
                    f"this cache holds {self.batch_size} row(s) of {self.dtype} on {self.device}, but the new tokens "
                    f"are {key_states.shape[0]} row(s) of {key_states.dtype} on {key_states.device}"
                )
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[2] > 1 and not torch.compiler.is_compiling() and self.is_empty:
            return None
        return self.state

    def store(self, state: SRFState, positions: int) -> None:
        """Take over the state after `positions` more fed positions (a Python int, padding included)."""
        assert self.state is not None
        if state is not self.state:  # a fused step has already overwritten it
            self.state.copy_(SRFState(*(t.detach() for t in state)))
        if isinstance(self.cumulative_length, torch.Tensor):
            self.cumulative_length.add_(positions)
        else:
            self.cumulative_length += positions

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        """Refused: there is no sequence of keys to append to."""
        raise ValueError(
            "a softmax attention layer tried to append keys to a random-feature state: this cache belongs to a "
            "retrofitted model; start another one"
        )

    @property
    def is_empty(self) -> bool:
        """Whether no position has been fed. Reads a tensor in a static cache, so not for a compiled step."""
        return self.state is None or int(self.cumulative_length) == 0

    @property
    def has_previous_state(self) -> dict[int, bool]:
        """For `Cache.has_previous_state`, which asks it of linear-attention layers."""
        return {0: not self.is_empty}

    def state_bytes(self) -> int:
        """Bytes of the state, at any length the same; 0 before the first token."""
        return 0 if self.state is None else self.state.nbytes()

    # -- what Transformers asks of a layer ---------------------------------------------------------------------------

    def get_seq_length(self) -> int | torch.Tensor:  # type: ignore[override]
        """Positions fed so far, padding included: an int, or a 0-dim tensor in a static cache."""
        return self.cumulative_length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset that a mask over all positions would have."""
        if self.max_cache_len is not None:
            return self.max_cache_len, 0
        return self.get_seq_length() + query_length, 0  # type: ignore[return-value]

    def get_max_length(self) -> int:
        """-1: a state has no maximum."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` in older releases."""
        return -1

    def reset(self) -> None:
        """Back to before the first token, in place."""
        if self.state is not None:
            b, g, _, d = self.state.kv_mean.shape
            empty = SRFState.empty(self.config, b, g, d, dtype=self.dtype, device=self.state.length.device)
            self.state.copy_(empty)
        if isinstance(self.cumulative_length, torch.Tensor):
            self.cumulative_length.zero_()
        else:
            self.cumulative_length = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows in the order of `beam_idx` (B,), in place."""
        if self.state is not None:
            self.state.copy_(self.state.index_select(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        if self.state is not None:
            self._hold(SRFState(*(t.repeat_interleave(repeats, dim=0) for t in self.state)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only these rows: indices, or a mask of booleans."""
        if self.state is not None:
            self._hold(SRFState(*(t[indices.to(t.device)] for t in self.state)))

    def crop(self, tokens_to_remove: int) -> None:
        """`crop(0)` does nothing; anything else is refused, since a sum cannot forget its last terms."""
        if tokens_to_remove != 0:
            raise ValueError(
                f"crop({tokens_to_remove}) is not possible: a random-feature state has summed its tokens up. Keep a "
                "copy (copy.deepcopy) of the cache at the point to return to"
            )

    def offload(self) -> None:
        """Move the state to the CPU."""
        if self.state is not None:
            self._hold(SRFState(*(t.to("cpu", non_blocking=True) for t in self.state)))

    def prefetch(self) -> None:
        """Move the state back to the device it was made on."""
        if self.state is not None and self.state.length.device != self.device:
            self._hold(SRFState(*(t.to(self.device, non_blocking=True) for t in self.state)))

    def softmax_layer(self) -> CacheLayerMixin:
        """The stock layer that this one stands for."""
        return DynamicLayer() if self.max_cache_len is None else StaticLayer(max_cache_len=self.max_cache_len)


# A virtual subclass: the masks of a hybrid's softmax layers are then sized by those layers, and a cache that offloads
# leaves this small state where it is.
LinearAttentionCacheLayerMixin.register(SRFCacheLayer)


def srf_cache_layer(cache: Cache, layer_idx: int, config: SRFConfig) -> SRFCacheLayer:
    """The `SRFCacheLayer` of a cache at `layer_idx`, put there if that place is still empty.

    Raises
    ------
    ValueError
        When the place holds keys and values already, which no state can be made of.
    """
    _fill_up(cache, layer_idx)
    layer = cache.layers[layer_idx]
    if isinstance(layer, SRFCacheLayer):
        return layer
    if layer.is_initialized and int(layer.get_seq_length()) > 0:  # type: ignore[union-attr]
        raise ValueError(
            f"layer {layer_idx} of this cache holds keys and values of softmax attention: a retrofitted layer cannot "
            "continue from them. Start from an empty cache"
        )
    max_cache_len = layer.max_cache_len if isinstance(layer, StaticLayer) else None
    replacement = SRFCacheLayer(config, max_cache_len)
    cache.layers[layer_idx] = replacement
    return replacement


def softmax_cache_layer(cache: Cache, layer_idx: int) -> None:
    """Make sure that exact attention finds a layer for keys and values at `layer_idx`.

    Raises
    ------
    ValueError
        When the place holds a random-feature state that has seen tokens.
    """
    _fill_up(cache, layer_idx)
    layer = cache.layers[layer_idx]
    if not isinstance(layer, SRFCacheLayer):
        return
    if not layer.is_empty:
        raise ValueError(
            f"layer {layer_idx} of this cache holds a random-feature state: exact attention cannot continue from it. "
            "Start from an empty cache"
        )
    cache.layers[layer_idx] = layer.softmax_layer()


def _fill_up(cache: Cache, layer_idx: int) -> None:
    """A `DynamicCache` made without a configuration appends its layers as they are first used."""
    while len(cache.layers) <= layer_idx:
        if cache.layer_class_to_replicate is None:
            raise ValueError(f"this cache has {len(cache.layers)} layers, but the model asks for layer {layer_idx}")
        cache.layers.append(cache.layer_class_to_replicate())


def state_bytes(cache: Cache) -> int:
    """Bytes of all random-feature states in a cache, the same at any length.

    Keys and values of layers that keep softmax attention are not counted: they grow.
    """
    return sum(layer.state_bytes() for layer in cache.layers if isinstance(layer, SRFCacheLayer))
