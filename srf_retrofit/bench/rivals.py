"""What this package is measured against on a GPU: exact attention by two backends, and linear attention of others.

A rival that cannot run says why in place of a figure; nothing here is substituted silently.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..timing import on_gpu
from .roofline import Sizes, Work, linear_work, softmax_work

Tensors = tuple[torch.Tensor, ...]
Function = Callable[..., torch.Tensor]

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
# The seed's operator takes seconds a call beyond this.
SEED_LONGEST = 8192


@dataclass(frozen=True)
class Rival:
    """An attention to compare with.

    Attributes
    ----------
    name, title : str
        Key in the results, and words for a table.
    function : callable
        Of the tensors that `prepare` makes; differentiable.
    prepare : callable
        Its inputs from q (B, H, L, D), k and v (B, G, L, D), made before the clock starts; leaves that need a gradient.
    work : callable
        `work(sizes, backward)`, or None where the count would be of another operator.
    longest : int, optional
        Longest sequence that it is asked for.
    note : str
        What a reader should know about the comparison.
    by_token : bool
        Whether it works on (B, L, H, D) instead.
    quadratic : bool
        Whether its time grows with the square of the length, which tells when a longer one is worth no attempt.
    """

    name: str
    title: str
    function: Function
    prepare: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Tensors]
    work: Callable[[Sizes, bool], Work] | None
    longest: int | None = None
    note: str = ""
    by_token: bool = False
    quadratic: bool = False


def leaves(*tensors: torch.Tensor) -> Tensors:
    """Detached tensors that gradients are taken of."""
    return tuple(x.detach().requires_grad_() for x in tensors)


@contextlib.contextmanager
def exact_backend(name: str) -> Iterator[None]:
    """Inside this context `scaled_dot_product_attention` runs this backend or fails; "default" leaves it free."""
    if name == "default":
        yield
        return
    with sdpa_kernel(BACKENDS[name]):
        yield


def sdpa(name: str, *, grouped: bool, causal: bool = True) -> Function:
    """`scaled_dot_product_attention` of one backend, q (B, H, L, D), k and v with `G` heads if `grouped`."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with exact_backend(name):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return attend


def exact_rival(name: str, heads: int, kv_heads: int, head_dim: int, device: str, dtype: torch.dtype) -> Rival:
    """Exact attention by one backend, with grouped heads where it takes them, and repeated beforehand where not."""
    group = heads // kv_heads
    grouped = group > 1
    note = ""
    if grouped and on_gpu(device):
        shapes = [(1, n, 128, head_dim) for n in (heads, kv_heads, kv_heads)]
        probe = leaves(*(torch.zeros(shape, device=device, dtype=dtype) for shape in shapes))
        try:
            sdpa(name, grouped=True)(*probe).sum().backward()
        except RuntimeError:
            grouped, note = False, f"{name} takes no grouped heads here: repeated beforehand, which is not timed"

    def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
        if not grouped and group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return leaves(q, k, v)

    titles = {"cudnn": "cuDNN attention", "flash": "flash attention", "default": "SDPA, PyTorch's choice"}
    return Rival(
        name,
        titles[name],
        sdpa(name, grouped=grouped),
        prepare,
        lambda sizes, backward: softmax_work(sizes, backward=backward),
        note=note,
        quadratic=True,
    )


def linear_rivals(heads: int, kv_heads: int, head_dim: int, device: str, dtype: torch.dtype) -> list[Rival]:
    """flash-linear-attention (package `fla-core`): its bare kernel on given features, and with its own feature maps.

    Its kernels know no grouped heads, so keys and values are repeated beforehand. The bare kernel has `D` features, no
    normaliser and no window; end to end, Hedgehog's maps (2402.04347, `2 D` features) are applied and normalised.

    Raises
    ------
    ImportError
        Where the package is not installed, or does not load.
    """
    from fla.modules.feature_map import HedgehogFeatureMap
    from fla.ops.linear_attn import chunk_linear_attn

    _tune_quickly("fla")
    group = heads // kv_heads
    query_map, key_map = (HedgehogFeatureMap(head_dim).to(device, dtype).requires_grad_(False) for _ in range(2))

    def by_token(x: torch.Tensor, repeat: int = 1) -> torch.Tensor:
        return x.detach().repeat_interleave(repeat, 1).transpose(1, 2).contiguous()

    def features(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
        return leaves(by_token(q).softmax(-1), by_token(k, group).softmax(-1), by_token(v, group))

    def bare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return chunk_linear_attn(q, k, v, scale=1.0, normalize=False)[0]

    def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return chunk_linear_attn(query_map(q), key_map(k), v, scale=1.0, normalize=True)[0]

    return [
        Rival(
            "fla",
            "fla, bare kernel",
            bare,
            features,
            lambda sizes, backward: linear_work(sizes, sizes.head_dim, backward=backward),
            note=f"features given, no normaliser, no window, heads repeated beforehand; {_TUNED}",
            by_token=True,
        ),
        Rival(
            "fla_maps",
            "fla, Hedgehog maps",
            whole,
            lambda q, k, v: leaves(by_token(q), by_token(k, group), by_token(v, group)),
            None,
            note=f"2 D features, normalised, no window, heads repeated beforehand; {_TUNED}",
            by_token=True,
        ),
    ]


_TUNED = "tuned by its own autotuner, at one depth of its pipelines"


def _tune_quickly(package: str) -> None:
    """Leave the autotuners of a package one pipeline depth, the middle one, and little time for each candidate.

    They tune anew for each batch size, among up to 48 candidates a kernel: all of them are hundreds of seconds of
    compilation, for a few percent.
    """
    from triton.runtime.autotuner import Autotuner, Heuristics
    from triton.testing import do_bench

    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == package]
    for kernel in [x for module in modules for x in list(vars(module).values())]:
        while isinstance(kernel, Heuristics):
            kernel = kernel.fn
        if isinstance(kernel, Autotuner):
            depths = sorted({config.num_stages for config in kernel.configs})
            middle = depths[len(depths) // 2]
            kernel.configs = [config for config in kernel.configs if config.num_stages == middle] or kernel.configs
            kernel.__dict__["do_bench"] = partial(do_bench, warmup=5, rep=20)


def seed_rival(heads: int, kv_heads: int, head_dim: int, device: str) -> Rival:
    """The operator this work started from (srf-attention), heads repeated beforehand.

    Raises
    ------
    ImportError
        Where the package is not installed.
    """
    from srf_attention import Attention

    group = heads // kv_heads
    module = Attention(d=head_dim, causal=True, device=device)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return module(q, k, v, mode="train", attn_fn="torch", chunk_size=256)

    return Rival(
        "seed",
        "the seed's operator",
        attend,
        lambda q, k, v: leaves(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)),
        None,
        longest=SEED_LONGEST,
        note="no window, heads repeated beforehand",
        quadratic=True,
    )
