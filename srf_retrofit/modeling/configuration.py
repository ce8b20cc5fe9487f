"""What a simplex-random-feature attention layer is: its sizes, its draw, and where it stands in a model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .eight_bits import GROUP

PROJECTIONS = ("simplex", "orthogonal", "iid")
FEATURE_MAPS = ("random", "trained", "hedgehog", "relu")
STATE_DTYPES = ("float32", "float16", "bfloat16")
KV_DTYPES = ("model", "int8")
CONFIG_VERSION = 5
# Levels of `chunked.priority_level` in a factor of two.
LEVELS = 4096

_SIZES = ("num_features", "window", "sinks", "retained", "retention_delay", "retention_half_life", "seed")
_TUPLES = ("layers", "layer_retained", "head_retained")


@dataclass(frozen=True)
class SRFConfig:
    """Hyper-parameters of the attention that replaces softmax attention.

    The exact part of the attention is made of the first `sinks` positions, the block of `window` positions that
    the query stands in, the block before it, and `retained` keys chosen by priority; everything else is estimated
    by `num_features` positive random features. `window = sinks = retained = 0` is the pure linear form.

    Parameters
    ----------
    num_features : int
        Features per key/value head, `M >= 0`; may be above or below the head dimension. 0 keeps exact keys alone and
        forgets the others; it needs `window >= 1`.
    window : int
        Positions per exact block, `>= 0`.
    sinks : int
        Leading positions that stay exact for ever, `>= 0`.
    retained : int
        Slots of a key/value head for keys that are kept exact after they left the window, `>= 0`; needs `window >= 1`.
    retention_delay : int
        A key's priority counts queries more than `min(retention_delay, window // 2)` positions later.
    retention_half_life : int
        Tokens after which a retained key's priority counts half, so that old keys make room; 0 keeps the best for ever.
    projection : {"simplex", "orthogonal", "iid"}
        Coupling of the rows of the projection (2301.13856, 2009.14794).
    feature_map : {"random", "trained", "hedgehog", "relu"}
        What estimates the other keys: the random features this package is about; the same once they have settled and
        are trained like any weight (`LearnedMaps.settle`); or, to compare with, the learned maps of Hedgehog and
        LoLCATs (2402.04347, 2410.10254) or of T2R (2103.13076).
    state_dtype : {"float32", "float16", "bfloat16"}
        Storage type of the running feature values between folds; sums and maxima stay in float32.
    kv_dtype : {"model", "int8"}
        How exact keys and values are stored: as the model computes them, or rounded to eight bits in groups of 16 with
        a common exponent (`eight_bits`), in training as in decoding, for little more than half the bytes. Needs
        `window >= 1` and a head dimension that is a multiple of 16.
    forget_gate : bool
        Whether every token says how much of what came before it counts from then on, see `forget_gate.ForgetGate`;
        for the pure form without sinks. The gate is trained, it adds `G (hidden_size + 1)` numbers a layer.
    seed : int
        Seed of the draw; together with the step and the layer index it fixes every projection, `>= 0`.
    layers : tuple of int, optional
        Indices of the layers that carry this attention; `None` means all of them.
    layer_retained : tuple of (int or tuple of int), optional
        `retained` of every layer of the model, in its order, where layers differ, or `head_retained` where its heads
        do, too; layers outside `layers` are counted and not looked at. `None`: `retained`, for all.
    head_retained : tuple of int, optional
        `retained` of every key/value head of a layer, where heads differ; `retained` is then the largest of them.
    version : int
        Version of this format. Reading a newer one is refused.

    Raises
    ------
    ValueError
        When a value is outside its range; the message names the field, the value and what would be accepted.
    """

    num_features: int = 64
    window: int = 32
    sinks: int = 4
    retained: int = 64
    retention_delay: int = 8
    retention_half_life: int = 512
    projection: str = "simplex"
    feature_map: str = "random"
    state_dtype: str = "float32"
    kv_dtype: str = "model"
    forget_gate: bool = False
    seed: int = 0
    layers: tuple[int, ...] | None = None
    layer_retained: tuple[int | tuple[int, ...], ...] | None = None
    head_retained: tuple[int, ...] | None = None
    version: int = CONFIG_VERSION

    def __post_init__(self) -> None:
        if isinstance(self.version, bool) or not isinstance(self.version, int) or self.version < 1:
            raise ValueError(f"version must be a positive integer, got {self.version!r}")
        if self.version > CONFIG_VERSION:
            raise ValueError(
                f"this SRF configuration has version {self.version}, but this release of srf_retrofit reads up to "
                f"version {CONFIG_VERSION}: install a newer srf_retrofit"
            )
        for name in _SIZES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be an integer, got {value!r}")
            if value < 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        if self.retained and not self.window:
            raise ValueError(
                f"retained={self.retained} needs window >= 1: keys are ranked by the attention they receive inside "
                "the window; set window, or retained=0 for the pure form"
            )
        if not self.num_features and not self.window:
            raise ValueError("num_features=0 with window=0 leaves nothing to attend to: set one of them")
        named = {
            "projection": PROJECTIONS,
            "feature_map": FEATURE_MAPS,
            "state_dtype": STATE_DTYPES,
            "kv_dtype": KV_DTYPES,
        }
        for name, choices in named.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.packs_keys and not self.window:
            raise ValueError(
                "kv_dtype='int8' stores the exact keys of a window in eight bits, and window=0 keeps none: set window, "
                "or kv_dtype='model'"
            )
        if not isinstance(self.forget_gate, bool):
            raise ValueError(f"forget_gate must be True or False, got {self.forget_gate!r}")
        if self.forget_gate and (self.window or self.sinks):
            raise ValueError(
                f"forget_gate=True fades keys that are met through features, and would leave exact ones beside them "
                f"as they are (window={self.window}, sinks={self.sinks}): set both to 0, or forget_gate=False"
            )
        if self.feature_map == "hedgehog" and self.num_features % 2:
            raise ValueError(f"hedgehog features come in pairs: num_features must be even, got {self.num_features}")
        if self.layers is not None:
            layers = tuple(self.layers)
            if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in layers):
                raise ValueError(f"layers must be non-negative integers, got {layers!r}")
            if not layers:
                raise ValueError("layers is empty: name at least one layer, or None for all of them")
            object.__setattr__(self, "layers", tuple(sorted(set(layers))))
        self._check_uneven()

    def _check_uneven(self) -> None:
        """Numbers of slots that differ by layer or by head: made tuples."""
        if self.head_retained is not None:
            heads = tuple(self.head_retained)
            _check_counts("head_retained", heads, heads)
            if max(heads) != self.retained:
                raise ValueError(f"retained must be the largest of head_retained={heads}, got {self.retained}")
            object.__setattr__(self, "head_retained", heads)
        if self.layer_retained is None:
            return
        if self.head_retained is not None:
            raise ValueError("head_retained says for one layer what layer_retained says for all: leave one of them out")
        layers = tuple(tuple(h) if isinstance(h, list) else h for h in self.layer_retained)
        heads = tuple(x for h in layers for x in _of_heads(h))
        _check_counts("layer_retained", heads, layers)
        if any(heads) and not (self.window and self.retained):
            raise ValueError(
                "layer_retained spreads slots over the layers of a form that has some: it needs window >= 1 and "
                f"retained >= 1, got window={self.window}, retained={self.retained}"
            )
        object.__setattr__(self, "layer_retained", layers)

    def check_shape(self, num_layers: int, num_kv_heads: int) -> None:
        """Refuse a model of another number of layers or key/value heads than this configuration speaks of.

        Raises
        ------
        ValueError
        """
        beyond = [i for i in self.layers or () if i >= num_layers]
        if beyond:
            raise ValueError(f"srf names layer(s) {beyond}, but the model has {num_layers} layers")
        if self.layer_retained is not None and len(self.layer_retained) != num_layers:
            raise ValueError(
                f"srf has layer_retained for {len(self.layer_retained)} layers, but the model has {num_layers}: give "
                "one entry for each"
            )
        for i in range(num_layers):
            self.for_layer(i).slots(num_kv_heads)

    def check_head_dim(self, head_dim: int) -> None:
        """Refuse heads whose vectors cannot be stored as this configuration says.

        Raises
        ------
        ValueError
        """
        if self.packs_keys and head_dim % GROUP:
            raise ValueError(
                f"kv_dtype='int8' takes numbers in groups of {GROUP}, but heads have {head_dim}: set kv_dtype='model'"
            )

    def for_layer(self, layer_idx: int) -> SRFConfig:
        """The configuration of one layer, whose `retained` is its own."""
        if self.layer_retained is None:
            return self
        return self.replace(layer_retained=None).with_slots(self.layer_retained[layer_idx])

    def with_slots(self, slots: int | tuple[int, ...]) -> SRFConfig:
        """A copy for a layer that retains so many keys: in every key/value head, or in each of them."""
        if isinstance(slots, int):
            return self.replace(retained=slots, head_retained=None)
        return self.replace(retained=max(slots), head_retained=slots if len(set(slots)) > 1 else None)

    def slots(self, num_kv_heads: int) -> tuple[int, ...]:
        """Keys that each key/value head of a layer retains.

        Raises
        ------
        ValueError
            When `head_retained` speaks of another number of heads.
        """
        if self.head_retained is None:
            return (self.retained,) * num_kv_heads
        if len(self.head_retained) != num_kv_heads:
            raise ValueError(
                f"head_retained={self.head_retained} has {len(self.head_retained)} entries, but there are "
                f"{num_kv_heads} key/value heads: give one number for each"
            )
        return self.head_retained

    @property
    def retained_text(self) -> str:
        """`retained` to be read: of all heads, or from the least to the most of any, with the mean."""
        if self.layer_retained is None:
            layers = [_of_heads(self.head_retained or self.retained)]
        else:
            layers = [_of_heads(h) for i, h in enumerate(self.layer_retained) if self.is_retrofitted(i)]
        least, most = min(map(min, layers)), max(map(max, layers))
        if least == most:
            return str(most)
        return f"{least} to {most} (mean {sum(sum(h) / len(h) for h in layers) / len(layers):.0f})"

    @property
    def packs_keys(self) -> bool:
        """Whether exact keys and values are stored in eight bits."""
        return self.kv_dtype == "int8"

    @property
    def is_pure(self) -> bool:
        """Whether no exact block is kept, so that the state is O(M D) alone."""
        return self.window == 0

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary of JSON types; `SRFConfig.from_dict` reads it back to an equal configuration."""
        out = dataclasses.asdict(self)
        for name in _TUPLES:
            value = getattr(self, name)
            out[name] = None if value is None else [list(x) if isinstance(x, tuple) else x for x in value]
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SRFConfig:
        """Read a dictionary written by `to_dict`; missing fields take their defaults.

        Raises
        ------
        ValueError
            For unknown fields, values out of range, or a version this release does not know.
        """
        if not isinstance(data, dict):
            raise ValueError(f"an SRF configuration must be a mapping, got {type(data).__name__}")
        data = dict(data)
        # The version is judged first: a newer format may have fields this release has never heard of.
        version = data.get("version", CONFIG_VERSION)
        if isinstance(version, int) and version > CONFIG_VERSION:
            cls(version=version)
        if version == 1:
            data = {"retention_half_life": 0, **data}  # no key's priority ever faded
        if version in (1, 2, 3, 4):
            data["version"] = CONFIG_VERSION
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(
                f"unknown SRF configuration field(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        for name in _TUPLES:
            if isinstance(data.get(name), list):
                data[name] = tuple(data[name])
        return cls(**data)

    @property
    def fade(self) -> int:
        """Levels by which a block's keys rank behind those of the block after it, at equal priority."""
        return round(LEVELS * self.window / self.retention_half_life) if self.retention_half_life else 0

    def replace(self, **changes: Any) -> SRFConfig:
        """A validated copy with `changes` applied."""
        return dataclasses.replace(self, **changes)

    def is_retrofitted(self, layer_idx: int) -> bool:
        """Whether the layer with this index carries the attention described here."""
        return self.layers is None or layer_idx in self.layers


def _of_heads(slots: int | tuple[int, ...]) -> tuple[int, ...]:
    """An entry of `layer_retained`, as numbers that have a least, a largest and a mean."""
    return slots if isinstance(slots, tuple) else (slots,)


def _check_counts(name: str, counts: tuple[int, ...], given: Any) -> None:
    if not counts or () in given or any(isinstance(h, bool) or not isinstance(h, int) or h < 0 for h in counts):
        raise ValueError(f"{name} must be non-negative integers, got {given!r}")
