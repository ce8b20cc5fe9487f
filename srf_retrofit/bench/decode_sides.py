"""The two sides of a decoding benchmark, each as one greedy step that a CUDA graph can hold.

Ours is a retrofitted model on a static cache of states. The exact side is the best that a cache of keys and values
allows: exactly as long as the context, so that no mask is needed and no masked position is paid for, its newest place
overwritten at every step, and the fastest of PyTorch's attention kernels for its shape. Caches hold random values at
the position asked for: a prefill would change no time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticCache

from ..modeling.attention import srf_attentions
from ..modeling.cache import SRFCacheLayer, srf_cache_layer
from ..modeling.configuration import SRFConfig
from ..modeling.state import SRFState
from ..surgery import retrofit, revert
from ..timing import Call, captured, on_gpu, time_calls
from .gates import check_tokens, compare
from .rivals import exact_backend

_INTERFACE = "srf_retrofit_exact_decode"
CANDIDATES = tuple((backend, packed) for backend in ("flash", "cudnn", "default") for packed in (False, True))


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama with tied embeddings."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    def kv_bytes_per_token(self, itemsize: int = 2) -> int:
        """Bytes of keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("llama-3.2-1b", 2048, 8192, 16, 32, 8, 64, 128256),
        ModelShape("smollm2-135m", 576, 1536, 30, 9, 3, 64, 49152),
    )
}


def build_model(shape: ModelShape, *, device: str, dtype: torch.dtype, seed: int = 0) -> LlamaForCausalLM:
    """A random softmax model of this shape, in evaluation mode, without gradients."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=1 << 20,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


class Greedy:
    """One greedy step of a model on its cache: reads `tokens` (B, 1), runs the model, leaves the next ones there.

    `logits` (B, vocabulary) are those of the last step.
    """

    def __init__(self, model: Any, cache: Cache, tokens: torch.Tensor, before: Call | None = None) -> None:
        self.model, self.cache, self.tokens, self.before = model, cache, tokens, before
        self.logits: torch.Tensor | None = None

    def __call__(self) -> None:
        with torch.no_grad():
            if self.before is not None:
                self.before()
            logits = self.model(input_ids=self.tokens, past_key_values=self.cache, use_cache=True).logits[:, -1]
            self.tokens.copy_(logits.argmax(-1, keepdim=True))
            self.logits = logits


# -- ours ------------------------------------------------------------------------------------------------------------


def fill_state_(state: SRFState, position: int | torch.Tensor, generator: torch.Generator | None = None) -> SRFState:
    """Random values as after `position` tokens (an int, or (B,) int64), in place."""
    for name, tensor in zip(SRFState._fields, state, strict=True):
        if name == "length":
            tensor.copy_(torch.as_tensor(position).to(tensor).expand_as(tensor))
        elif name == "k_sum":
            tensor.uniform_(1.0, 50.0, generator=generator)
        elif name.endswith("priority"):
            tensor.uniform_(0.0, 1.0, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(generator=generator)
    return state


def srf_layers(cache: Cache) -> list[SRFCacheLayer]:
    """The layers of a cache that hold states."""
    return [layer for layer in cache.layers if isinstance(layer, SRFCacheLayer)]


def srf_cache(model: Any, batch: int, position: int, device: str) -> StaticCache:
    """A static cache of a retrofitted model, at `position`, with random states."""
    cache = StaticCache(config=model.config, max_cache_len=position + 1)
    for attention in srf_attentions(model):
        features = attention.attn_fn
        layer = srf_cache_layer(cache, attention.layer_idx, attention.srf_config)
        like = torch.empty(batch, features.num_kv_heads, 0, features.head_dim, dtype=model.dtype, device=device)
        layer.lazy_initialization(like, like)
    move_to_(cache, position)
    return cache


def move_to_(cache: Cache, position: int) -> None:
    """All rows of a cache of states to `position`, in place, with fresh random values."""
    for layer in srf_layers(cache):
        assert layer.state is not None
        fill_state_(layer.state, position)
        layer.cumulative_length.fill_(position)


# -- exact -----------------------------------------------------------------------------------------------------------


class FullLayer(CacheLayerMixin):
    """Keys and values of a full context, whose last place every step overwrites: decoding at a constant context."""

    is_compileable = False
    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to allocate."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        """Write the newest key and value, and return all of them."""
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Positions before the newest."""
        return self.keys.shape[2] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """No mask is made; its length would be the context's."""
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        """The context."""
        return self.keys.shape[2]

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` in older releases."""
        return self.keys.shape[2]


def exact_cache(shape: ModelShape, batch: int, context: int, device: str, dtype: torch.dtype) -> Cache:
    """Random keys and values of `context` tokens in every layer."""
    size = (batch, shape.kv_heads, context, shape.head_dim)
    layers: list[Any] = [
        FullLayer(*(torch.empty(size, dtype=dtype, device=device).normal_() for _ in range(2)))
        for _ in range(shape.layers)
    ]
    return Cache(layers=layers)


def decode_attention(backend: str, packed: bool) -> Callable[..., torch.Tensor]:
    """Attention of one query per row over a full cache, q (B, H, 1, D), k and v (B, G, L, D), without a mask.

    `packed` turns the query heads of a group into rows of one head, so that keys and values are read once for them.
    """

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        b, heads, _, d = q.shape
        g = k.shape[1]
        with exact_backend(backend):
            if not packed:
                return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=heads != g)
            rows = q.reshape(b, g, heads // g, d)
            return scaled_dot_product_attention(rows, k, v, scale=scale).reshape(b, heads, 1, d)

    return attend


@functools.cache  # the same function again, so that what was compiled with it still holds
def _interface(backend: str, packed: bool) -> Callable[..., tuple[torch.Tensor, None]]:
    attend = decode_attention(backend, packed)

    def interface(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        return attend(query, key, value, kwargs.get("scaling")).transpose(1, 2), None

    return interface


def use_exact(model: Any, backend: str, packed: bool) -> None:
    """Let a softmax model decode by `decode_attention`."""
    # An attention unknown to Transformers' masks gets none.
    AttentionInterface.register(_INTERFACE, _interface(backend, packed))
    model.set_attn_implementation(_INTERFACE)


def fastest_exact(shape: ModelShape, cache: Cache, batch: int, device: str) -> tuple[str, bool]:
    """The backend and layout of `CANDIDATES` that take the least time on this cache, each in a CUDA graph.

    Raises
    ------
    RuntimeError
        When none runs.
    """
    layers: list[Any] = list(cache.layers[: min(4, len(cache.layers))])
    keys = layers[0].keys
    q = torch.randn(batch, shape.heads, 1, shape.head_dim, device=device).to(keys.dtype)
    times: dict[tuple[str, bool], float] = {}
    problem: Exception | None = None
    for backend, packed in CANDIDATES if on_gpu(device) else [("default", False), ("default", True)]:
        attend = decode_attention(backend, packed)

        def run(attend: Callable[..., torch.Tensor] = attend) -> None:
            with torch.no_grad():
                for layer in layers:
                    attend(q, layer.keys, layer.values)

        try:
            run()  # a backend that refuses does so here, not inside a capture
            times[backend, packed] = time_calls([captured(run, device, warmup=1)], device, seconds=0.05).median
        except RuntimeError as error:
            problem = error
    if not times:
        raise RuntimeError(f"no exact attention runs: {problem}")
    return min(times, key=lambda key: times[key])


def stock_cache(model: Any, kind: str, shape: ModelShape, batch: int, context: int, device: str) -> tuple[Cache, Any]:
    """Transformers' own "dynamic" or "static" cache before its last position, and what resets it before a step."""
    size = (batch, shape.kv_heads, context - 1, shape.head_dim)
    if kind == "dynamic":
        dynamic = DynamicCache(config=model.config)
        for i in range(shape.layers):
            keys, values = (torch.empty(size, dtype=model.dtype, device=device).normal_() for _ in range(2))
            dynamic.update(keys, values, i)
        return dynamic, None
    static = StaticCache(config=model.config, max_cache_len=context)
    layers: list[Any] = list(static.layers)
    like = torch.empty(batch, shape.kv_heads, 0, shape.head_dim, dtype=model.dtype, device=device)
    for layer in layers:
        layer.lazy_initialization(like, like)
        layer.keys.normal_()
        layer.values.normal_()

    def reset() -> None:
        for layer in layers:
            layer.cumulative_length.fill_(context - 1)

    return static, reset


# -- gates -----------------------------------------------------------------------------------------------------------

GATE_MODEL = ModelShape("gate", 256, 384, 2, 4, 2, 64, 512)


@torch.no_grad()
def gate_model(device: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """The small random softmax model of the gates, with peaked logits: a wrong state shows in the tokens."""
    model: Any = build_model(GATE_MODEL, device=device, dtype=dtype, seed=seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(5)
    return model


@torch.no_grad()
def gate_start(model: Any, config: SRFConfig, device: str, seed: int = 0) -> tuple[StaticCache, torch.Tensor]:
    """A cache of the retrofitted gate model after a real prefill of two rows, and their next tokens (2, 1)."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(3, GATE_MODEL.vocabulary, (2, config.window + 9), generator=generator).to(device)
    cache = StaticCache(config=model.config, max_cache_len=1024)
    logits = model(input_ids=prompt, past_key_values=cache, use_cache=True).logits
    return cache, logits[:, -1].argmax(-1, keepdim=True)


def restorer(cache: Cache) -> Call:
    """What puts the states, or the keys and values, of a cache back to what they are now, in place."""
    tensors: list[torch.Tensor] = []
    layers: list[Any] = list(cache.layers)
    for layer in layers:
        is_state = isinstance(layer, SRFCacheLayer)
        tensors += (*layer.state, layer.cumulative_length) if is_state else (layer.keys, layer.values)
    kept = [t.clone() for t in tensors]

    def restore() -> None:
        for tensor, before in zip(tensors, kept, strict=True):
            tensor.copy_(before)

    return restore


@torch.no_grad()
def check_graphs(config: SRFConfig, *, device: str, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """Both sides on a small random model: what is replayed is what the model computes.

    Ours: two rows with a real prefill, then tokens through two folds, replayed from a graph and eagerly, must be the
    same. Exact: a step of every attention that may be chosen gives the logits that a `DynamicCache` gives.

    Raises
    ------
    GateError
        When they differ.
    """
    model = gate_model(device, dtype, seed)
    found: dict[str, Any] = {"exact_logits": _check_exact(model, device, dtype)}

    retrofit(model, config)
    cache, first = gate_start(model, config, device, seed)
    restore_cache = restorer(cache)
    step = Greedy(model, cache, first.clone())

    def restore() -> None:
        restore_cache()
        step.tokens.copy_(first)

    def tokens(run: Call) -> torch.Tensor:
        restore()
        seen = []
        for _ in range(2 * config.window + 5):
            run()
            seen.append(step.tokens.clone())
        return torch.cat(seen, 1)

    eager = tokens(step)
    found["tokens"] = check_tokens("decoding step", tokens(captured(step, device)), eager)
    revert(model)
    return found


def _check_exact(model: Any, device: str, dtype: torch.dtype) -> float:
    context = 65
    mine = exact_cache(GATE_MODEL, 2, context, device, dtype)
    stock = DynamicCache(config=model.config)
    layers: list[Any] = list(mine.layers)
    for i, layer in enumerate(layers):
        stock.update(layer.keys[:, :, :-1].clone(), layer.values[:, :, :-1].clone(), i)
    ids = torch.tensor([[5], [7]], device=device)
    truth = model(input_ids=ids, past_key_values=stock, use_cache=True).logits
    worst, before = 0.0, model.config._attn_implementation
    for backend, packed in CANDIDATES if on_gpu(device) else [("default", False), ("default", True)]:
        use_exact(model, backend, packed)
        try:
            logits = model(input_ids=ids, past_key_values=mine, use_cache=True).logits
        except RuntimeError:
            continue  # a backend that refuses is never chosen
        worst = max(worst, compare(f"logits of {backend} attention", logits, truth, dtype, slack=3.0))
    model.set_attn_implementation(before)
    return worst
