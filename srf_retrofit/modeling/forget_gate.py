"""Forgetting for the pure form: how much of what came before a token counts from then on.

Exact keys give softmax attention a sharp picture of the last few tokens. A form without any sees every earlier key
through the same few features, and what is near drowns in what is far. With a factor `f_t = sigmoid(w . x_t + b)` for
each token and key/value head, the weight of key `j` for query `i` becomes

    K_ij prod_{j < t <= i} f_t = e^{c_i - c_j} sum_r e^{a_ir + b_jr},   c_i = sum_{t <= i} log f_t

(the forget gate of the Forgetting Transformer, 2503.02130, section 3, there on softmax attention). `c_i` is the same
for all keys of a query and cancels in its normaliser, so all that is left of it is `-c_j` beside a key's log-features.
A state counts from its last token: a row that continues begins with `c = 0`, and one that ends moves its references.
Inside a call `c` is float32, so that weights are off by `|c| 2^-24`: by 1e-3 after 16 thousand e-fold fadings.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

# Tokens after which a head's memory has faded to 1/e at first: from the nearest head to the farthest, geometrically.
NEAREST, FARTHEST = 16.0, 2048.0


class ForgetGate(nn.Module):
    """One factor per token and key/value head, from the hidden state that the projections read.

    Parameters
    ----------
    num_kv_heads, hidden_size : int
        `G`, `E`.
    device : torch.device or str, optional

    Attributes
    ----------
    weight : (G, E) float32, zero at first
    bias : (G,) float32
        At first such that head `g` keeps 1/e over `NEAREST ** (1 - t) * FARTHEST ** t` tokens, `t = g / (G - 1)`.
    """

    def __init__(self, num_kv_heads: int, hidden_size: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.num_kv_heads, self.hidden_size = num_kv_heads, hidden_size
        for name, value in self.initial_values().items():
            self.register_parameter(name, nn.Parameter(value.to(device)))

    def extra_repr(self) -> str:
        return f"heads={self.num_kv_heads}, hidden={self.hidden_size}"

    def initial_values(self) -> dict[str, torch.Tensor]:
        """What a layer starts from, on the CPU, by name of the parameter."""
        g = self.num_kv_heads
        spans = torch.logspace(math.log10(NEAREST), math.log10(FARTHEST), g, device="cpu", dtype=torch.float64)
        # sigmoid(b) = e^{-1 / span}.
        bias = -torch.expm1(1 / spans).log()
        return {
            "weight": torch.zeros(g, self.hidden_size, device="cpu"),
            "bias": bias.float(),
        }

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`log f` (B, G, L), float32 or wider, for hidden states (B, L, E)."""
        weight, bias = self.get_parameter("weight"), self.get_parameter("bias")
        with torch.autocast(hidden_states.device.type, enabled=False):
            return F.logsigmoid(F.linear(hidden_states.to(weight.dtype), weight, bias)).transpose(1, 2)

    def _apply(self, fn, recurse: bool = True):
        # It stands in exponents, which stay float32.
        before = {name: p.data for name, p in self.named_parameters()}
        super()._apply(fn, recurse)
        for name, p in self.named_parameters():
            if p.dtype in (torch.float16, torch.bfloat16):
                p.data = before[name].to(p.device, torch.float32)
        return self


def forgotten(
    log_forget: torch.Tensor, mask: torch.Tensor | None, documents: list[tuple[int, int]] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of log-factors up to every token of its row, and up to the end of every row.

    Parameters
    ----------
    log_forget : (B, G, L)
    mask : (B, L) bool, optional
        Padding forgets nothing.
    documents : list of (start, end), optional
        Bounds of rows packed into one (`B = 1`); each begins at 0.

    Returns
    -------
    (B, G, L), (rows, G)
        In the dtype of `log_forget`, added up in float64.
    """
    if mask is not None:
        log_forget = log_forget.masked_fill(~mask.unsqueeze(1), 0.0)
    total = log_forget.double().cumsum(-1)
    if documents is None:
        return total.to(log_forget.dtype), total[..., -1].to(log_forget.dtype)
    padded = F.pad(total, (1, 0))
    bounds = torch.tensor([documents[0][0], *(end for _, end in documents)], device=total.device)
    at = padded.index_select(-1, bounds)
    lengths = bounds.diff()
    own = total - at[..., :-1].repeat_interleave(lengths, -1, output_size=total.shape[-1])
    ends = (at[..., 1:] - at[..., :-1]).squeeze(0).T
    return own.to(log_forget.dtype), ends.to(log_forget.dtype)
