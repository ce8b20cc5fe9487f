"""One attention module outside any model: the interface of srf-attention 1.0.16 on the operator of this package.

It takes queries, keys and values that exist already (after rotary embedding, not yet scaled) and holds nothing but
the random projection, so it can stand wherever softmax attention stood.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .configuration import SRFConfig
from .feature_map import FeatureMap
from .ops import srf_attention
from .random_features import draw_projection
from .state import SRFState

# Draws of `redraw_on_call_` take their step from above the steps that `redraw_` counts.
_FIRST_RANDOM_STEP = 1 << 32


class Attention(nn.Module):
    """Simplex-random-feature attention over given queries, keys and values.

    The first six parameters are those of srf-attention, in its order. By default no key is kept exact
    (`window = sinks = retained = 0`): the pure linear form, O(L) in time and memory, with an O(M D) state.

    Every key/value head has a projection of its own. The number of heads need not be known at construction: head `g`
    depends on (seed, step, g) alone, so the buffer grows at the first call that needs more heads and those already
    drawn stay as they are. Give `num_heads` where a buffer must not change shape later (DistributedDataParallel,
    `torch.compile`).

    Parameters
    ----------
    d : int
        Head dimension `D`, any.
    causal : bool
        Whether a query sees no key after its own position.
    n_features : int, optional
        Features per head `M`, above, at or below `d`; default `d`.
    scale, normalize : bool
        Must be False. Both rescale the rows of the projection, whose squared norms must be chi-squared with `d`
        degrees of freedom for the kernel estimate to be unbiased (2301.13856, section 3).
    device : torch.device or str, optional
        Of the projection.
    num_heads : int
        Key/value heads drawn at construction.
    window, sinks, retained : int
        Keys kept exact, see `SRFConfig`; retained ones need `causal=True`.
    projection : {"simplex", "orthogonal", "iid"}
        Coupling of the rows.
    state_dtype : {"float32", "float16", "bfloat16"}
        Storage type of the running feature values in inference; all arithmetic is in float32 (float64 for float64
        inputs).
    kv_dtype : {"model", "int8"}
        Storage type of exact keys and values, see `SRFConfig`.
    seed : int, optional
        Seed of the projections, `0 <= seed < 2**63`. By default it is taken from PyTorch's global generator, so that
        the instances of several layers differ and `torch.manual_seed` fixes them all.

    Attributes
    ----------
    projection_matrix : (heads, M, D) float32 buffer
        Saved with the module, together with its address (seed, step); stays float32 under `.half()` and the like.

    Raises
    ------
    ValueError, TypeError
        When an argument is out of range or of the wrong kind; the message names the value and the remedy.

    Examples
    --------
    >>> attn = Attention(d=64, n_features=64, causal=True)
    >>> q, k, v = (torch.randn(1, 8, 1024, 64) for _ in range(3))
    >>> o = attn(q, k, v, mode="train", attn_fn="torch")
    >>> attn.redraw_()  # between optimizer steps
    >>> o, state = attn(q, k, v, mode="inference")  # prefill
    >>> o, state = attn(q[:, :, -1:], k[:, :, -1:], v[:, :, -1:], mode="inference", state=state)  # one more token
    """

    projection_matrix: torch.Tensor
    draw_address: torch.Tensor

    def __init__(
        self,
        d: int,
        causal: bool = True,
        n_features: int | None = None,
        scale: bool = False,
        normalize: bool = False,
        device: torch.device | str | None = None,
        *,
        num_heads: int = 1,
        window: int = 0,
        sinks: int = 0,
        retained: int = 0,
        projection: str = "simplex",
        state_dtype: str = "float32",
        kv_dtype: str = "model",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(causal, bool):
            raise TypeError(f"causal must be True or False, got {causal!r}; the number of features is n_features=")
        for name, value in (("scale", scale), ("normalize", normalize)):
            if value is not False:
                raise ValueError(
                    f"{name}={value!r} rescales the rows of the projection, which makes the kernel estimate biased: "
                    f"leave {name}=False"
                )
        if retained and not causal:
            raise ValueError(
                f"retained={retained} ranks keys by the queries that follow them and needs causal=True; set retained=0 "
                "for attention in both directions"
            )
        if seed is None:
            seed = int(torch.randint(1 << 62, (), device="cpu"))
        elif isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
            raise ValueError(f"seed must be an integer in [0, 2**63), got {seed!r}")
        self.d = d
        self.causal = causal
        self.n_features = d if n_features is None else n_features
        self.redraw_on_call = False
        self.config = SRFConfig(
            num_features=self.n_features,
            window=window,
            sinks=sinks,
            retained=retained,
            projection=projection,
            state_dtype=state_dtype,
            kv_dtype=kv_dtype,
            seed=seed,
        )
        self.config.check_head_dim(d)
        # Seed, steps taken by `redraw_`, and the step that the projection was drawn at: equal but for redraw_on_call.
        self.register_buffer("draw_address", torch.tensor([seed, 0, 0], dtype=torch.int64, device="cpu"))
        self.register_buffer("projection_matrix", self._draw(num_heads, 0).to(device or "cpu"))

    def redraw_on_call_(self, value: bool = True) -> None:
        """Whether every call in train mode draws a new projection first.

        Like dropout's, these draws are addressed by PyTorch's global CPU generator. Gradient checkpointing
        restores that generator for its recomputation (`preserve_rng_state=True`, the default, of
        `torch.utils.checkpoint.checkpoint`), which so meets the projection of its own forward. Prefer `redraw_()`
        between optimizer steps where all processes must draw alike. Inference never redraws.
        """
        self.redraw_on_call = bool(value)

    @torch.no_grad()
    def redraw_(self, device: torch.device | str | None = None) -> None:
        """Draw the projection of the next step, on every process the same.

        A state of earlier calls belongs to the old projection and must not be continued. Under gradient
        checkpointing call this between optimizer steps only, never between a forward and its backward.

        Parameters
        ----------
        device : torch.device or str, optional
            Where the projection is to live; default where it lives now.
        """
        step = int(self.draw_address[1]) + 1
        self._replace_projection(self._draw(self.projection_matrix.shape[0], step), device)
        self.draw_address[1:] = step

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mode: str = "train",
        attn_fn: str = "torch",
        chunk_size: int | None = None,
        *,
        state: SRFState | None = None,
        attention_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> Any:
        """Attention output, and in inference the state after it.

        Parameters
        ----------
        q : (B, H, L, D) float
        k, v : (B, G, L, D) float
            `G` divides `H` (grouped-query attention).
        mode : {"train", "inference"}
            "train" is differentiable and stateless. "inference" takes no gradients and carries a state: a prefill
            of any length, further chunks, and single tokens all go through it.
        attn_fn : {"torch"}
            The seed's second choice, "flash", is refused.
        chunk_size : int, optional
            Positions handled at once, a trade of memory against speed that leaves the result as it is.
        state : SRFState, optional
            In inference, what earlier calls returned; default the beginning of a sequence. It is not modified.
        attention_mask : (B, L), optional
            1 or True for real tokens. Others get output 0 and leave no trace.
        cu_seqlens : (N + 1,) int, optional
            Boundaries of documents packed into one row (`B = 1`); none attends to another.

        Returns
        -------
        o : (B, H, L, D) in the dtype of `q` ("train")
        (o, state) : ("inference")

        Raises
        ------
        ValueError
            For an unknown mode or attn_fn, shapes that do not fit, or a state where none can be used.
        """
        if attn_fn != "torch":
            remedy = ": its kernel knows no random features; attn_fn='torch' is O(L) here" if attn_fn == "flash" else ""
            raise ValueError(f"attn_fn must be 'torch', got {attn_fn!r}{remedy}")
        if mode not in ("train", "inference"):
            raise ValueError(f"mode must be 'train' or 'inference', got {mode!r}")
        inference = mode == "inference"
        if inference and not self.causal:
            raise ValueError("mode='inference' carries a state from token to token and needs causal=True")
        if state is not None and not inference:
            raise ValueError("a state is carried in mode='inference' only; mode='train' begins every sequence anew")
        if k.dim() != 4 or q.shape[-1] != self.d:
            raise ValueError(
                f"q, k, v must be (batch, heads, length, {self.d}), got {tuple(q.shape)}, {tuple(k.shape)} and "
                f"{tuple(v.shape)}"
            )
        weight = self._projection_for(k.shape[1], fresh=self.redraw_on_call and not inference)
        # Exact, and nothing for up to 32 bits: float64 inputs, as in a gradient check, are attended to in float64.
        weight = weight.to(torch.promote_types(q.dtype, torch.float32))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not inference):
            o, state = srf_attention(
                q,
                k,
                v,
                FeatureMap(weight),
                self.config,
                causal=self.causal,
                attention_mask=attention_mask,
                cu_seqlens=cu_seqlens,
                initial_state=state,
                output_final_state=inference,
                chunk_size=chunk_size,
            )
        return (o, state) if inference else o

    def extra_repr(self) -> str:
        """What `print` shows."""
        exact = "".join(f", {name}={getattr(self.config, name)}" for name in ("window", "sinks", "retained"))
        return (
            f"d={self.d}, n_features={self.n_features}, causal={self.causal}, projection={self.config.projection!r}"
            + ("" if self.config.is_pure and not self.config.sinks else exact)
        )

    def _draw(self, num_heads: int, step: int, first: int = 0) -> torch.Tensor:
        """Projections of heads `first` to `num_heads - 1` at `step`, (heads, M, D) float32 on the CPU."""
        if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
            raise ValueError(f"num_heads must be an integer >= 1, got {num_heads!r}")
        # The head takes the address that a layer has elsewhere: streams of different addresses never coincide.
        return torch.cat(
            [
                draw_projection(
                    self.n_features,
                    self.d,
                    num_heads=1,
                    projection=self.config.projection,
                    seed=int(self.draw_address[0]),
                    step=step,
                    layer=head,
                )
                for head in range(first, num_heads)
            ]
        )

    def _replace_projection(self, projection: torch.Tensor, device: torch.device | str | None = None) -> None:
        # Replaced, not overwritten: a graph that was built with the old one still differentiates with it.
        self.projection_matrix = projection.to(self.projection_matrix.device if device is None else device)

    @torch.no_grad()
    def _projection_for(self, num_heads: int, *, fresh: bool) -> torch.Tensor:
        """Projections of the first `num_heads` heads, drawn now where `fresh` or not there yet."""
        drawn = self.projection_matrix.shape[0]
        if fresh:
            step = _FIRST_RANDOM_STEP + int(torch.randint(1 << 31, (), device="cpu"))
            self._replace_projection(self._draw(max(num_heads, drawn), step))
            self.draw_address[2] = step
        elif num_heads > drawn:
            further = self._draw(num_heads, int(self.draw_address[2]), first=drawn)
            self._replace_projection(torch.cat([self.projection_matrix, further.to(self.projection_matrix)]))
        return self.projection_matrix[:num_heads]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Another number of heads is no mismatch: the buffer takes the shape that was saved.
        saved = state_dict.get(prefix + "projection_matrix")
        if saved is not None and saved.dim() == 3 and saved.shape[1:] == self.projection_matrix.shape[1:]:
            self.projection_matrix = self.projection_matrix.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.config = self.config.replace(seed=int(self.draw_address[0]))

    def _apply(self, fn: Any, recurse: bool = True) -> Attention:
        # `.half()` and `.bfloat16()` must not round the projection; only where it lives may change.
        exact = self.projection_matrix
        super()._apply(fn, recurse)
        moved = self.projection_matrix
        self.projection_matrix = moved.float() if exact.is_meta else exact.to(moved.device)
        return self
