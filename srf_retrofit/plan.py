"""What a retrofit would change in a model, and what it would cost: to be read before anything is done."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from .modeling.configuration import SRFConfig

_LENGTHS = (1024, 4096, 16384, 65536)


@dataclass(frozen=True)
class RetrofitPlan:
    """What `retrofit` would do to a model, and what its state would cost beside a key/value cache.

    Bytes of caches are for one row, and for the retrofitted layers alone: the others keep what they have.

    Attributes
    ----------
    model_class, target_class : str
        Class of the model, before and after.
    config : SRFConfig
        With `layers` filled in.
    num_layers : int
    layers : tuple of int
        Layers that change; the others keep softmax attention.
    num_heads, num_kv_heads, head_dim : int
        `H`, `G`, `D` of those layers.
    dtype : str
        Of the weights, and so of the keys and values.
    parameters : int
        Weights of the adopted q/k/v/o projections, which stay as they are.
    buffer_bytes : int
        Added to the model and to its checkpoint: projections and geometry.
    state_bytes : int
        Of the recurrent state, at any length.
    kv_bytes_per_token : int
        Of the cache of keys and values that the state replaces.
    """

    model_class: str
    target_class: str
    config: SRFConfig
    num_layers: int
    layers: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    parameters: int
    buffer_bytes: int
    state_bytes: int
    kv_bytes_per_token: int

    @property
    def softmax_layers(self) -> tuple[int, ...]:
        """Layers that keep softmax attention."""
        return tuple(sorted(set(range(self.num_layers)) - set(self.layers)))

    @property
    def break_even_length(self) -> int:
        """Tokens from which on the state is no larger than the keys and values it replaces."""
        return math.ceil(self.state_bytes / self.kv_bytes_per_token)

    def kv_bytes(self, length: int) -> int:
        """Bytes of keys and values of `length` tokens in the retrofitted layers."""
        return length * self.kv_bytes_per_token

    def to_dict(self, lengths: Iterable[int] = _LENGTHS) -> dict[str, Any]:
        """Plain dictionary of JSON types, with the key/value bytes at `lengths`."""
        out = asdict(self)
        out.update(config=self.config.to_dict(), layers=list(self.layers), softmax_layers=list(self.softmax_layers))
        out["break_even_length"] = self.break_even_length
        out["kv_bytes"] = {str(length): self.kv_bytes(length) for length in lengths}
        return out

    def __str__(self) -> str:
        c = self.config
        kind = c.projection if c.feature_map == "random" else c.feature_map
        pure = f"none (pure form{', with a forget gate' if c.forget_gate else ''})"
        exact = pure if c.is_pure else f"{c.sinks} sinks, window {c.window}, {c.retained_text} retained"
        rows = [
            ("model", f"{self.model_class} -> {self.target_class} ({self.dtype})"),
            ("retrofitted layers", f"{len(self.layers)} of {self.num_layers}: {_ranges(self.layers)}"),
            ("softmax layers", _ranges(self.softmax_layers) if self.softmax_layers else "none"),
            ("heads", f"{self.num_heads} query, {self.num_kv_heads} key/value, dimension {self.head_dim}"),
            ("features", f"{c.num_features} {kind}, seed {c.seed}"),
            ("exact keys", exact),
            ("adopted weights", f"{self.parameters:,} (unchanged)"),
            ("added buffers", _bytes(self.buffer_bytes)),
            ("state per sequence", f"{_bytes(self.state_bytes)} at any length"),
            ("break-even", f"{self.break_even_length:,} tokens"),
        ]
        rows += [
            (f"keys/values at {n:,}", f"{_bytes(self.kv_bytes(n))} ({self.kv_bytes(n) / self.state_bytes:.1f}x)")
            for n in _LENGTHS
        ]
        return "\n".join(f"{name:<23}{value}" for name, value in rows)


def _ranges(indices: tuple[int, ...]) -> str:
    """`0-3, 7` for (0, 1, 2, 3, 7)."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _bytes(count: int) -> str:
    """Bytes in the unit that reads best, powers of 1024."""
    power = min(int(math.log2(max(count, 1))) // 10, 3)
    return f"{count / 1024**power:.{min(power, 1)}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"
