"""The random features of one layer: what is drawn, what is fitted, and what a checkpoint keeps of them."""

from __future__ import annotations

import torch
from torch import nn

from .configuration import SRFConfig
from .feature_map import FeatureMap, FoldedMap, round_weights
from .forget_gate import ForgetGate
from .ops import fold, full_precision
from .random_features import draw_projection

_GEOMETRY = ("query_shift", "key_shift", "preconditioner", "inverse_transpose", "proposal")


def no_foresight(num_kv_heads: int, head_dim: int) -> torch.Tensor:
    """The table (G, 1 + 4 D) by which keys compete by the attention they received alone."""
    table = torch.zeros(num_kv_heads, 1 + 4 * head_dim, device="cpu", dtype=torch.float32)
    table[:, 0] = 1.0
    return table


@torch.no_grad()
def set_foresight_(module: nn.Module, value: torch.Tensor | None, num_kv_heads: int, head_dim: int) -> None:
    """Overwrite the buffer `foresight` (G, 1 + 4 D) of a layer's features; `None` for none.

    Raises
    ------
    ValueError
        When the layer retains no keys, or the value has another shape, is not finite or has a negative factor in its
        first column. Nothing is changed then.
    """
    table = dict(module.named_buffers(recurse=False)).get("foresight")
    if table is None:
        raise ValueError("this layer retains no keys (retained=0): there is nothing to foresee")
    if value is None:
        value = no_foresight(num_kv_heads, head_dim)
    if value.shape != table.shape:
        raise ValueError(f"foresight must have shape {tuple(table.shape)}, got {tuple(value.shape)}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError("foresight has values that are not finite")
    if bool((value[:, 0] < 0).any()):
        raise ValueError(f"the factors of the priority must be >= 0, got {value[:, 0].min().item():.4g}")
    table.copy_(value)


def forget_gate(
    config: SRFConfig, num_kv_heads: int, hidden_size: int | None, *, device: torch.device | str | None = None
) -> ForgetGate | None:
    """The gate that a configuration asks for, if it does.

    Raises
    ------
    ValueError
        When it does and the size of its inputs is not known.
    """
    if not config.forget_gate:
        return None
    if hidden_size is None:
        raise ValueError("forget_gate=True needs hidden_size, the size of what the gate reads")
    return ForgetGate(num_kv_heads, hidden_size, device=device)


class SRFFeatures(nn.Module):
    """Projection, geometry and weights of one layer's features, per key/value head, as persistent float32 buffers.

    The buffers are always there, so that every checkpoint has the same keys; a geometry that was never fitted holds
    the identity and costs nothing (`feature_map` leaves it out). They stay float32 under `.half()`, `.bfloat16()` and
    `.to(dtype)`: rounding them in one place and not in another would bias the kernel. Only float64 widens them.

    Parameters
    ----------
    config : SRFConfig
    num_kv_heads, head_dim : int
        `G` and `D`.
    layer : int
        Index of the layer, part of the address (seed, step, layer) of every draw.
    hidden_size : int, optional
        `E`, for a configuration with a forget gate.
    device : torch.device or str, optional

    Attributes
    ----------
    projection : (G, M, D)
    log_weight : (G, M)
    foresight : (G, 1 + 4 D)
        Where keys are retained: see `retention.priority_level`.
    query_shift, key_shift, proposal : (G, D)
    preconditioner, inverse_transpose : (G, D, D)
    gate : ForgetGate or None
    step : int
        Step of the last draw made here. It is not saved: what is saved is the projection itself.
    redraw_on_call : bool
        See `redraw_on_call_`.
    """

    projection: torch.Tensor
    log_weight: torch.Tensor
    query_shift: torch.Tensor
    key_shift: torch.Tensor
    preconditioner: torch.Tensor
    inverse_transpose: torch.Tensor
    proposal: torch.Tensor

    def __init__(
        self,
        config: SRFConfig,
        num_kv_heads: int,
        head_dim: int,
        layer: int = 0,
        *,
        hidden_size: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.step = 0
        self.redraw_on_call = False
        self._folded: tuple[tuple[torch.Tensor, ...], tuple[int, ...], FeatureMap, FoldedMap, FoldedMap] | None = None
        g, m, d = num_kv_heads, config.num_features, head_dim
        square, vector = (g, d, d), (g, d)
        shapes = {"projection": (g, m, d), "query_shift": vector, "key_shift": vector, "proposal": vector}
        shapes.update(preconditioner=square, inverse_transpose=square, log_weight=(g, m))
        if config.retained:
            shapes["foresight"] = (g, 1 + 4 * d)
        for name, shape in shapes.items():
            self.register_buffer(name, torch.empty(shape, dtype=torch.float32, device=device))
        self.gate = forget_gate(config, num_kv_heads, hidden_size, device=device)
        if not self.projection.is_meta:
            for name, value in self.initial_values().items():
                getattr(self, name).copy_(value)

    def extra_repr(self) -> str:
        return f"heads={self.num_kv_heads}, features={self.config.num_features}, dim={self.head_dim}"

    def initial_values(self) -> dict[str, torch.Tensor]:
        """What a layer starts from: the draw of step 0 and the identity geometry, on the CPU, by buffer name."""
        g, d = self.num_kv_heads, self.head_dim
        zeros = torch.zeros(g, d, device="cpu", dtype=torch.float32)
        eye = torch.eye(d, device="cpu", dtype=torch.float32).expand(g, d, d)
        foresight = {"foresight": no_foresight(g, d)} if self.config.retained else {}
        return foresight | {
            "projection": self._draw(0),
            "log_weight": torch.zeros(g, self.config.num_features, device="cpu", dtype=torch.float32),
            "query_shift": zeros,
            "key_shift": zeros,
            "proposal": zeros,
            "preconditioner": eye,
            "inverse_transpose": eye,
        }

    def _draw(self, step: int) -> torch.Tensor:
        c = self.config
        return draw_projection(
            c.num_features,
            self.head_dim,
            num_heads=self.num_kv_heads,
            projection=c.projection,
            seed=c.seed,
            step=step,
            layer=self.layer,
        )

    @property
    def device(self) -> torch.device:
        """Where the features are."""
        return self.projection.device

    # -- what the attention reads ------------------------------------------------------------------------------------

    def feature_map(self) -> FeatureMap:
        """Projection and geometry for `ops.srf_attention`; parts that are the identity are `None`."""
        return self._current()[0]

    def folded(self, dtype: torch.dtype | None = None) -> FoldedMap:
        """The same, folded for both sides; kept until a buffer changes, so that a decoding step does not fold.

        `dtype`: of the inputs that it is for, see `feature_map.round_weights`.
        """
        _, exact, rounded = self._current()
        return rounded if dtype == torch.bfloat16 else exact

    def _current(self) -> tuple[FeatureMap, FoldedMap, FoldedMap]:
        """Feature map and folds of the buffers as they stand, worked out again only when one of them has changed.

        A change is seen by identity and version counter, not by value: this asks nothing of the device, and also
        catches loaders that replace or overwrite buffers behind this module's back.
        """
        buffers = (self.projection, *(getattr(self, name) for name in _GEOMETRY), self.log_weight)
        if self.config.retained:
            buffers = (*buffers, self.get_buffer("foresight"))
        kept = self._folded
        trained = torch.is_grad_enabled() and any(t.requires_grad for t in buffers)
        if torch.compiler.is_compiling() or trained:
            # Version counters cannot be traced: a compiled step relies on the prefill before it. Features that are
            # themselves trained need a graph of their own each time, and all their parts.
            if kept is not None and not trained:
                return kept[2:]
            maps = FeatureMap(*buffers)
            with full_precision(self.projection.device):
                folded = fold(maps)
                return maps, folded, round_weights(folded, torch.bfloat16)
        versions = tuple(0 if t.is_inference() else t._version for t in buffers)
        if (
            kept is not None
            and versions == kept[1]
            and all(new is old for new, old in zip(buffers, kept[0], strict=True))
            # Folds made under inference_mode cannot be saved for a backward pass.
            and (torch.is_inference_mode_enabled() or not kept[3].key.weight.is_inference())
        ):
            return kept[2:]
        maps = self._without_identities()
        with full_precision(self.projection.device):
            folded = fold(maps)
            rounded = round_weights(folded, torch.bfloat16)
        self._folded = (buffers, versions, maps, folded, rounded)
        return maps, folded, rounded

    @torch.no_grad()
    def _without_identities(self) -> FeatureMap:
        eye = torch.eye(self.head_dim, dtype=self.projection.dtype, device=self.projection.device)
        parts = [
            self.query_shift.any() | self.key_shift.any(),
            (self.preconditioner != eye).any() | (self.inverse_transpose != eye).any(),
            self.proposal.any(),
            self.log_weight.any(),
        ]
        foresight = self.get_buffer("foresight") if self.config.retained else None
        if foresight is not None:
            parts.append((foresight != no_foresight(self.num_kv_heads, self.head_dim).to(foresight)).any())
        shifted, preconditioned, proposed, weighted, *foresees = torch.stack(parts).tolist()
        return FeatureMap(
            self.projection,
            self.query_shift if shifted else None,
            self.key_shift if shifted else None,
            self.preconditioner if preconditioned else None,
            self.inverse_transpose if preconditioned else None,
            self.proposal if proposed else None,
            self.log_weight if weighted else None,
            foresight if foresees == [True] else None,
        )

    # -- what changes them -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def resample(self, step: int) -> None:
        """Overwrite the projection, in place, with the draw of (seed, `step`, layer); the geometry stays.

        Only between optimizer steps: features that change between a forward and its backward, or a checkpointed
        recomputation, give the gradient of neither.
        """
        self.projection.copy_(self._draw(step))
        self.step = step
        self._folded = None

    @torch.no_grad()
    def set_log_weight(self, value: torch.Tensor | None = None) -> None:
        """Overwrite the features' log-weights in place, (G, M) or anything that expands to it; `None` for zeros.

        Raises
        ------
        ValueError
            When the value is not finite. Nothing is changed then.
        """
        if value is not None and not bool(torch.isfinite(value).all()):
            raise ValueError("log_weight has values that are not finite")
        self.log_weight.copy_(torch.zeros_like(self.log_weight) if value is None else value)
        self._folded = None

    def set_foresight(self, value: torch.Tensor | None = None) -> None:
        """Overwrite, in place, which keys are foreseen to matter, see `set_foresight_`; `None` for no foresight."""
        set_foresight_(self, value, self.num_kv_heads, self.head_dim)
        self._folded = None

    def redraw_(self, device: torch.device | str | None = None) -> None:
        """The seed's name for `resample` with the step after the last one.

        `device` is accepted for the seed's sake and not needed: the draw is made on the CPU, the same for every
        process, and copied to where the buffer is. The count starts again at 0 with the process; training that
        resumes should rather draw by its own step (`resample`, `ResampleFeaturesCallback`).
        """
        self.resample(self.step + 1)

    def redraw_on_call_(self, flag: bool) -> None:
        """Whether the model redraws this layer's features before every forward in training mode; off by default.

        The model does it, once, before its first layer runs: a checkpointed layer's second forward would otherwise
        see other features than its first. With gradient checkpointing on, the model refuses instead, since a second
        forward may come before the first one's backward.
        """
        self.redraw_on_call = bool(flag)

    @torch.no_grad()
    def set_geometry(
        self,
        *,
        query_shift: torch.Tensor | None = None,
        key_shift: torch.Tensor | None = None,
        preconditioner: torch.Tensor | None = None,
        inverse_transpose: torch.Tensor | None = None,
        proposal: torch.Tensor | None = None,
    ) -> None:
        """Overwrite the whole geometry in place; what is not given becomes the identity. See `FeatureMap`.

        Raises
        ------
        ValueError
            When a shape is wrong, a value is not finite, an entry of `proposal` is not below 1/4, or only one half
            of a preconditioner is given. Nothing is changed then.
        """
        if (preconditioner is None) != (inverse_transpose is None):
            raise ValueError("preconditioner and inverse_transpose belong together: give both or neither")
        given = (query_shift, key_shift, preconditioner, inverse_transpose, proposal)
        values = self.initial_values()
        for name, value in zip(_GEOMETRY, given, strict=True):
            if value is None:
                continue
            if value.shape != getattr(self, name).shape:
                expected = tuple(getattr(self, name).shape)
                raise ValueError(f"{name} must have shape {expected}, got {tuple(value.shape)}")
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} has values that are not finite")
            values[name] = value
        if proposal is not None and not bool((proposal < 0.25).all()):
            raise ValueError(f"proposal must stay below 1/4 everywhere, got {proposal.max().item():.4g}")
        for name in _GEOMETRY:
            getattr(self, name).copy_(values[name])
        self._folded = None

    def __getstate__(self):
        return {**self.__dict__, "_folded": None}

    def _apply(self, fn, recurse: bool = True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = old.to(new.device, torch.float32)
        self._folded = None
        return self
