"""Decoder layers compiled for training: norms, rotations, gates and casts become a few kernels.

All layers of a model share one graph, so that compiling takes seconds and not minutes; the attention stays the operator
that it is (`modeling.fused`), and everything outside the layers runs as before: heads that are replaced, hooks of
wrappers, features that are resampled between steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..modeling.attention import SRFAttention, srf_attentions
from ..modeling.ops import choose_backend


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model, however it is wrapped: the modules that hold an attention of their own, in order."""
    return [module for module in model.modules() if isinstance(getattr(module, "self_attn", None), nn.Module)]


@contextlib.contextmanager
def compiled_layers(*models: nn.Module, backend: str = "inductor") -> Iterator[None]:
    """Inside this context the decoder layers of these models run compiled, each as one graph without breaks.

    Shapes are compiled for as they come: rows of one length compile once, forward with and without gradients being two,
    and so do layers that retain as many keys as one another, or as many in the head that retains most.
    Weights, names, `state_dict` and copies of the models know nothing of it. Layers whose attention runs on the PyTorch
    core (`ops.choose_backend`) are left as they are: its loop over segments would be unrolled.

    Parameters
    ----------
    *models : PreTrainedModel, wrapped or not
    backend : str
        Of `torch.compile`.

    Raises
    ------
    ValueError
        When a model has no decoder layers, or checkpoints them: what is recomputed cannot be one graph.
    torch._dynamo.exc.Unsupported
        From the first forward, when a layer cannot be one graph.
    """
    chosen: list[nn.Module] = []
    for model in models:
        layers = decoder_layers(model)
        if not layers:
            raise ValueError(f"this {type(model).__name__} has no decoder layers to compile")
        if any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
            raise ValueError(
                f"the layers of this {type(model).__name__} are checkpointed, and recomputation cannot be compiled "
                "here: leave either gradient checkpointing or compilation off"
            )
        chosen += [layer for layer in layers if _is_opaque(layer.self_attn)]
    before = [layer._compiled_call_impl for layer in chosen]
    kinds = {layer.self_attn.srf_config for layer in chosen if isinstance(layer.self_attn, SRFAttention)}
    # All layers share one function, whose graphs are counted: as many are let for every kind as there are for one.
    limit = torch._dynamo.config.recompile_limit * max(1, len(kinds))
    hooks = []
    try:
        for layer in chosen:
            layer.compile(fullgraph=True, dynamic=False, backend=backend)
        for model in models:
            # A graph cannot see that features have changed, and reads what was folded last.
            ours = srf_attentions(model)
            if ours:
                hooks.append(model.register_forward_pre_hook(lambda *_, ours=ours: _fold(ours)))
        with torch._dynamo.config.patch(recompile_limit=limit):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer, compiled in zip(chosen, before, strict=True):
            layer._compiled_call_impl = compiled


def _is_opaque(attention: Any) -> bool:
    """Whether an attention is one operator to a compiler: softmax, or random features on the fused kernels."""
    if not isinstance(attention, SRFAttention) or attention.exact:
        return True
    weight = next(attention.k_proj.parameters())
    q = weight.new_empty(1, attention.config.num_attention_heads, 2, attention.head_dim)
    return choose_backend(q, attention.srf_config, backend=attention.backend)[0] == "triton"


def _fold(layers: list[SRFAttention]) -> None:
    for layer in layers:
        if not layer.exact:
            layer.folded()
