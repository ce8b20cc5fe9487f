"""Feature maps that are trained like any weight: random features that have settled, and maps to compare them with.

What they share with random features is the form `sum_r e^{a_r(q) + b_r(k)}`; what they estimate is whatever training
makes of them. Maps are per key/value head, the queries of a group sharing theirs, so that the state costs the same
bytes as that of random features; the mixing factor beside exact keys is per query head.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from .configuration import SRFConfig
from .feature_map import Features, FoldedMap, LinearFeatures, ReluFeatures, SoftmaxFeatures, round_weights
from .features import SRFFeatures, forget_gate, no_foresight, set_foresight_
from .random_features import draw_projection

# Exact weights start at a tenth of the features' scale (LoLCATs' released configurations).
_FIRST_MIXING = math.log(10.0)


class LearnedMaps(nn.Module):
    """Feature maps of one layer as trainable float32 parameters; stands where `SRFFeatures` stands.

    "trained" is the form that `fold_feature_map` gives random features, each side with a map of its own; it begins with
    a draw and the identity geometry, or with what a layer's random features are now (`settle`). "hedgehog" begins with
    orthonormal directions, so that its first features are softmaxes of coordinates of a rotated query or key
    (2402.04347 begins with the identity); "relu" with orthogonal rows of norm 1 and no bias (2103.13076).

    Parameters
    ----------
    config : SRFConfig
        `feature_map` says which; `num_features` is the number of features, both signs of Hedgehog's counted.
    num_kv_heads, head_dim, num_heads : int
        `G`, `D`, `H`.
    hidden_size : int, optional
        `E`, for a configuration with a forget gate.
    layer : int
        Part of the address of the draw that the maps start from.
    device : torch.device or str, optional
    """

    redraw_on_call = False
    foresight: torch.Tensor  # (G, 1 + 4 D), where keys are retained: see `retention.priority_level`

    def __init__(
        self,
        config: SRFConfig,
        num_kv_heads: int,
        head_dim: int,
        layer: int = 0,
        *,
        num_heads: int | None = None,
        hidden_size: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self._group = (num_heads or num_kv_heads) // num_kv_heads
        for name, value in self.initial_values().items():
            if name == "foresight":
                self.register_buffer(name, value.to(device))
            else:
                self.register_parameter(name, nn.Parameter(value.to(device)))
        self.gate = forget_gate(config, num_kv_heads, hidden_size, device=device)

    def extra_repr(self) -> str:
        c = self.config
        return f"{c.feature_map}, heads={self.num_kv_heads}, features={c.num_features}, dim={self.head_dim}"

    def initial_values(self) -> dict[str, torch.Tensor]:
        """What a layer starts from, on the CPU, by the name of the parameter or buffer."""
        c = self.config
        foresight = {"foresight": no_foresight(self.num_kv_heads, self.head_dim)} if c.retained else {}
        if c.feature_map == "trained":
            plain = c.replace(feature_map="random", forget_gate=False)
            random = SRFFeatures(plain, self.num_kv_heads, self.head_dim, self.layer, device="cpu")
            return _unfolded(random) | foresight
        rows = c.num_features // 2 if c.feature_map == "hedgehog" else c.num_features
        directions = draw_projection(
            rows, self.head_dim, num_heads=self.num_kv_heads, projection="orthogonal", seed=c.seed, layer=self.layer
        )
        directions = directions / directions.norm(dim=-1, keepdim=True)
        values = {"query_weight": directions, "key_weight": directions.clone()} | foresight
        if c.feature_map == "relu":
            zero = torch.zeros(self.num_kv_heads, rows, device="cpu")
            values.update(query_bias=zero, key_bias=zero.clone())
        if c.window:
            values["mixing"] = torch.full((self.num_kv_heads, self._group), _FIRST_MIXING, device="cpu")
        return values

    @classmethod
    def settle(cls, features: SRFFeatures) -> LearnedMaps:
        """Random features as they are now, geometry and log-weights included, as a map to be trained.

        The estimate is the same at first. From then on queries and keys have maps of their own and nothing keeps it
        unbiased: training finds its own balance of bias and variance.
        """
        config = features.config.replace(feature_map="trained")
        gate = features.gate
        maps = cls(
            config, features.num_kv_heads, features.head_dim, features.layer,
            hidden_size=None if gate is None else gate.hidden_size, device=features.device,
        )  # fmt: skip
        maps.gate = gate
        with torch.no_grad():
            for name, value in _unfolded(features).items():
                maps.get_parameter(name).copy_(value)
            if config.retained:
                maps.set_foresight(features.get_buffer("foresight"))
        return maps.to(features.projection.dtype)

    @property
    def device(self) -> torch.device:
        """Where the maps are."""
        return self.get_parameter("query_weight").device

    def set_foresight(self, value: torch.Tensor | None = None) -> None:
        """As `SRFFeatures.set_foresight`."""
        set_foresight_(self, value, self.num_kv_heads, self.head_dim)

    def folded(self, dtype: torch.dtype | None = None) -> FoldedMap:
        """Both maps, for `ops.srf_attention`; `dtype`: of the inputs, see `feature_map.round_weights`."""
        foresight = self.get_buffer("foresight") if self.config.retained else None
        maps = FoldedMap(*self._sides(), foresight=foresight)
        return maps if dtype is None else round_weights(maps, dtype)

    def _sides(self) -> tuple[Features, Features]:
        p = dict(self.named_parameters())
        if self.config.feature_map == "trained":
            query, key = (
                LinearFeatures(*(p[f"{side}_{name}"] for name in LinearFeatures._fields)) for side in ("query", "key")
            )
            return query, key
        if self.config.feature_map == "hedgehog":
            return SoftmaxFeatures(p["query_weight"], p.get("mixing")), SoftmaxFeatures(p["key_weight"])
        return (
            ReluFeatures(p["query_weight"], p["query_bias"], p.get("mixing")),
            ReluFeatures(p["key_weight"], p["key_bias"]),
        )

    def _apply(self, fn, recurse: bool = True):
        # Exponents stay float32, as those of random features do.
        before = {name: p.data for name, p in self.named_parameters()}
        table = self._buffers.get("foresight")
        super()._apply(fn, recurse)
        if table is not None and self.foresight.dtype in (torch.float16, torch.bfloat16):
            self.foresight = table.to(self.foresight.device, torch.float32)
        for name, p in self.named_parameters():
            if p.dtype in (torch.float16, torch.bfloat16):
                p.data = before[name].to(p.device, torch.float32)
        return self


def feature_module(
    config: SRFConfig,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    layer: int = 0,
    *,
    hidden_size: int | None = None,
    device: torch.device | str | None = None,
) -> SRFFeatures | LearnedMaps:
    """The features of one layer, of the kind that `config.feature_map` names; sizes as in `LearnedMaps`."""
    if config.feature_map == "random":
        return SRFFeatures(config, num_kv_heads, head_dim, layer, hidden_size=hidden_size, device=device)
    return LearnedMaps(
        config, num_kv_heads, head_dim, layer, num_heads=num_heads, hidden_size=hidden_size, device=device
    )


@torch.no_grad()
def _unfolded(features: SRFFeatures) -> dict[str, torch.Tensor]:
    """The folded map of random features, every part of it written out, by parameter name."""
    g, d = features.num_kv_heads, features.head_dim
    identity = torch.eye(d, device=features.device).expand(g, d, d)
    zero = torch.zeros(g, d, device=features.device)
    values = {}
    for side, folded in zip(("query", "key"), features.folded()[:2], strict=True):
        assert isinstance(folded, LinearFeatures)
        norm_weight = identity if folded.norm_weight is None else folded.norm_weight
        norm_bias = zero if folded.norm_bias is None else folded.norm_bias
        parts = (folded.weight, folded.bias, norm_weight, norm_bias)
        values.update({f"{side}_{name}": t.clone() for name, t in zip(LinearFeatures._fields, parts, strict=True)})
    return values
