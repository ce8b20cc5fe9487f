"""A greedy step whose elementwise work is fused by `torch.compile`: for retrofitted and for softmax models alike.

Three pieces are compiled: what comes before the layers, one layer, and what comes after them. All layers of a model run
the same compiled code: its weights and its cache are inputs. For that, no layer may know its number: each is given a
cache of its own, of one layer, under the number 0. Compiling a model of 16 layers as a whole gives the same kernels,
16 times over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import Cache

from ..modeling.attention import srf_attentions
from ..modeling.cache import SRFCacheLayer
from ..modeling.configuration import SRFConfig
from ..surgery import retrofit, revert
from ..timing import Call, captured
from .decode_sides import GATE_MODEL, Greedy, exact_cache, fastest_exact, gate_model, gate_start, restorer, use_exact
from .gates import GateError, compare

# What `torch.compile` is told; tests take a backend that generates no code.
BACKEND = "inductor"


class CompiledGreedy:
    """As `decode_sides.Greedy`, compiled; `tokens` (B, 1) are read and replaced by the next ones.

    Parameters
    ----------
    model : PreTrainedModel
        A Llama with a language model's head, retrofitted or not.
    cache : Cache
        `decode_sides.srf_cache` or `exact_cache`. Lengths of keys may differ between caches without another
        compilation; batch sizes may not.
    tokens : (B, 1) int64

    Attributes
    ----------
    logits : (B, vocabulary), of the last step
    """

    def __init__(self, model: Any, cache: Cache, tokens: torch.Tensor) -> None:
        self.model, self.tokens = model, tokens
        self.caches = [Cache(layers=[layer]) for layer in cache.layers]
        self.logits: torch.Tensor | None = None
        first: Any = cache.layers[0]
        if isinstance(first, SRFCacheLayer):
            assert first.state is not None
            self.positions = first.state.length
            for attention in srf_attentions(model):  # a compiled step finds its features folded
                attention.attn_fn.folded()
        else:
            self.positions = torch.full((1,), first.get_seq_length(), device=tokens.device)
            layers: list[Any] = list(cache.layers)
            for layer in layers:
                for tensor in (layer.keys, layer.values):
                    torch._dynamo.maybe_mark_dynamic(tensor, 2)

    def __call__(self) -> None:
        begin, run_layer, end = _pieces()
        base = self.model.model
        with torch.no_grad(), _numbered_zero(base.layers):
            hidden, rotation = begin(base, self.tokens, self.positions)
            for layer, cache in zip(base.layers, self.caches, strict=True):
                hidden = run_layer(layer, hidden, rotation, cache)
            self.logits = end(self.model, hidden, self.tokens)


def _begin(base: Any, tokens: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, Any]:
    hidden = base.embed_tokens(tokens)
    return hidden, base.rotary_emb(hidden, position_ids=positions.unsqueeze(-1))


def _run_layer(layer: Any, hidden: torch.Tensor, rotation: Any, cache: Cache) -> torch.Tensor:
    return layer(hidden, attention_mask=None, position_embeddings=rotation, past_key_values=cache, use_cache=True)


def _end(model: Any, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    logits = model.lm_head(model.model.norm(hidden))[:, -1]
    tokens.copy_(logits.argmax(-1, keepdim=True))
    return logits


_COMPILED: dict[str, list[Any]] = {}


def _pieces() -> list[Any]:
    if BACKEND not in _COMPILED:
        options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": BACKEND}
        _COMPILED[BACKEND] = [torch.compile(piece, **options) for piece in (_begin, _run_layer, _end)]
    return _COMPILED[BACKEND]


@contextlib.contextmanager
def _numbered_zero(layers: Any) -> Iterator[None]:
    """Inside this context every layer looks for its keys and values at place 0."""
    attentions = [layer.self_attn for layer in layers]
    numbers = [attention.layer_idx for attention in attentions]
    for attention in attentions:
        attention.layer_idx = 0
    try:
        yield
    finally:
        for attention, number in zip(attentions, numbers, strict=True):
            attention.layer_idx = number


# -- gate ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_compiled(config: SRFConfig, *, device: str, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """Both sides of a small random model: a graph of the compiled step against eager steps that are fed its tokens.

    Fused code rounds elsewhere than eager code, so tokens need not be the same. Logits agree to the tolerance of the
    dtype, at every step through two folds; and where a token differs, the eager logits of both are as near as the
    logits themselves.

    Returns
    -------
    dict
        By side: `logits`, their relative rms error, and `tokens`, the share of equal ones.

    Raises
    ------
    GateError
        When they differ by more.
    """
    torch.compiler.reset()
    model = gate_model(device, dtype, seed)
    full = exact_cache(GATE_MODEL, 2, 65, device, dtype)
    use_exact(model, *fastest_exact(GATE_MODEL, full, 2, device))
    steps = 2 * config.window + 5
    found = {"exact": _compare(model, full, torch.tensor([[5], [7]], device=device), steps, device, dtype)}
    model.set_attn_implementation("sdpa")
    retrofit(model, config)
    found["ours"] = _compare(model, *gate_start(model, config, device, seed), steps, device, dtype)
    revert(model)
    torch.compiler.reset()
    return found


def _compare(
    model: Any, cache: Cache, first: torch.Tensor, steps: int, device: str, dtype: torch.dtype
) -> dict[str, float]:
    restore = restorer(cache)
    eager, step = Greedy(model, cache, first.clone()), CompiledGreedy(model, cache, first.clone())

    def run(call: Call, mine: Greedy | CompiledGreedy, given: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        restore()
        logits, tokens = [], [first]
        for i in range(steps):
            mine.tokens.copy_(tokens[-1] if given is None else given[i])
            call()
            assert mine.logits is not None
            logits.append(mine.logits.clone())
            tokens.append(mine.tokens.clone())
        return torch.stack(logits), torch.stack(tokens)

    expected, fed = run(eager, eager, None)
    logits, tokens = run(captured(step, device), step, fed)
    error = compare("logits of the compiled step", logits, expected, dtype, slack=3.0)
    behind = expected.amax(-1, keepdim=True) - expected.gather(-1, tokens[1:])
    if bool((behind > 2 * (logits - expected).abs().max()).any()):
        raise GateError("a compiled step chose a token that its own logits do not explain")
    return {"logits": error, "tokens": float((tokens == fed).double()[1:].mean())}
