"""Softmax model in, retrofitted model out, and back: planned first, applied in place, undone bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .modeling.attention import check_dropout, srf_attentions
from .modeling.configuration import SRFConfig
from .modeling.configuration_hf import choose_layers
from .modeling.learned_maps import feature_module
from .modeling.modeling import FAMILIES, Family, become_softmax, become_srf, find_family
from .modeling.state import SRFState
from .plan import RetrofitPlan

# What a model read from a GGUF file still carries although its weights are plain tensors.
_GGUF_MARKS = ("hf_quantizer", "is_quantized", "quantization_method")


def plan_retrofit(
    model: PreTrainedModel,
    config: SRFConfig | None = None,
    *,
    layers: Iterable[int] | slice | None = None,
) -> RetrofitPlan:
    """Say what `retrofit` with the same arguments would do; changes nothing.

    The model may be on the meta device: only its structure is read.

    Raises
    ------
    TypeError, ValueError
        As `retrofit`, except for what only the weights show.
    """
    return _plan(model, config, layers)[0]


def retrofit(
    model: PreTrainedModel,
    config: SRFConfig | None = None,
    *,
    layers: Iterable[int] | slice | None = None,
    calibration: Iterable[Any] | None = None,
) -> PreTrainedModel:
    """Replace the softmax attention of a pretrained model by simplex random features, in place.

    Every weight stays the object it was; each chosen attention layer, the model and its configuration change their
    class (`LlamaForCausalLM` becomes `SRFLlamaForCausalLM`, and so on), and each chosen layer gains a projection.
    Device, dtype, training mode and hooks stay.

    Parameters
    ----------
    model : PreTrainedModel
        Llama, Mistral, Qwen2 or Qwen3, base model or causal language model.
    config : SRFConfig, optional
    layers : iterable of int, slice, optional
        Layers to retrofit, negative indices from the end; `config.layers` by default, and every layer with full
        attention if that is `None` too. The others keep softmax attention.
    calibration : iterable of batches, optional
        Given to `calibrate`, which fits the geometry. If it fails the model is reverted.

    Returns
    -------
    PreTrainedModel
        The same object.

    Raises
    ------
    TypeError
        When the model is of no supported family, or wrapped by something else.
    ValueError
        When it is retrofitted already, quantised, on the meta device, drops attention weights out, or has weights
        that are not finite; when `layers` is empty, out of range, or names layers without full attention. The message
        says what to do first. Nothing has been changed then.
    """
    plan, family = _plan(model, config, layers)
    _check_weights(model)
    with _without_hooks(model, plan.layers):
        for conf in _configs(model):
            conf.__class__ = family.srf_config
            # A configuration that was read from a file repeats the model type of its old class.
            conf.__dict__.pop("model_type", None)
            conf.srf = plan.config.to_dict()
        become_srf(model)
    _clear_gguf_marks(model)
    if calibration is not None:
        from .calibration import calibrate

        try:
            calibrate(model, calibration)
        except BaseException:
            revert(model)
            raise
    return model


def revert(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `retrofit`, in place: the softmax model bit for bit, with the same parameters and class as before.

    Features and their geometry are dropped. Also works on a model loaded from a retrofitted checkpoint.

    Raises
    ------
    TypeError, ValueError
        When the model is not a retrofitted one.
    """
    family = _supported(model)
    if not _is_retrofitted(model, family):
        raise ValueError(f"this {type(model).__name__} is not retrofitted: there is nothing to revert")
    layers = tuple(layer.layer_idx for layer in srf_attentions(model))
    with _without_hooks(model, layers):
        become_softmax(model)
        for conf in _configs(model):
            del conf.srf
            # Marks of a saved checkpoint.
            if hasattr(conf, "auto_map"):
                del conf.auto_map
            names = {family.srf_model.__name__: family.model.__name__, family.srf_head.__name__: family.head.__name__}
            if conf.architectures:
                conf.architectures = [names.get(name, name) for name in conf.architectures]
            conf.__class__ = family.config
            conf.__dict__.pop("model_type", None)
    for name, value in model.__dict__.pop("_srf_gguf_marks", {}).items():
        setattr(model.config if name == "quantization_config" else model, name, value)
    return model


def _plan(
    model: PreTrainedModel, config: SRFConfig | None, layers: Iterable[int] | slice | None
) -> tuple[RetrofitPlan, Family]:
    family = _supported(model)
    if _is_retrofitted(model, family):
        raise ValueError(f"this {type(model).__name__} is retrofitted already: revert(model) first, or load it afresh")
    _check_quantised(model)
    config = SRFConfig() if config is None else config
    if not isinstance(config, SRFConfig):
        raise TypeError(f"config must be an SRFConfig, got {type(config).__name__}")
    conf = model.config
    config.replace(layers=None).check_shape(conf.num_hidden_layers, conf.num_key_value_heads)  # layers are judged below
    if getattr(conf, "is_heterogeneous", False):
        raise ValueError("per-layer configurations are not supported: the heads of all layers must be the same")
    if not getattr(conf, "is_causal", True):
        raise ValueError("config.is_causal is False: only causal attention has a recurrent form")
    chosen = _choose(conf, config, layers)

    attentions = _attentions(model, chosen)
    for index, layer in zip(chosen, attentions, strict=True):
        if type(layer) is not family.attention.softmax_class():
            raise ValueError(
                f"attention of layer {index} is a {type(layer).__name__}, not a "
                f"{family.attention.softmax_class().__name__}: undo what changed it first"
            )
        check_dropout(layer.attention_dropout)
        if layer.head_dim < 2:
            raise ValueError(f"head_dim must be at least 2, got {layer.head_dim} in layer {index}")
        config.check_head_dim(layer.head_dim)
    first = attentions[0]
    num_kv_heads = conf.num_attention_heads // first.num_key_value_groups
    dtype = first.v_proj.weight.dtype if first.v_proj.weight.is_floating_point() else model.dtype
    heads, everything = conf.num_attention_heads, len(chosen) == conf.num_hidden_layers
    state_bytes = buffer_bytes = 0
    for own in (config.for_layer(i) for i in chosen):
        state_bytes += SRFState.empty(own, 1, num_kv_heads, first.head_dim, dtype=dtype, device="meta").nbytes()
        added = feature_module(own, heads, num_kv_heads, first.head_dim, hidden_size=conf.hidden_size, device="meta")
        buffer_bytes += sum(t.numel() * t.element_size() for t in added.state_dict().values())
    plan = RetrofitPlan(
        model_class=type(model).__name__,
        target_class=(family.srf_model if type(model) is family.model else family.srf_head).__name__,
        config=config.replace(layers=None if everything else tuple(chosen)),
        num_layers=conf.num_hidden_layers,
        layers=tuple(chosen),
        num_heads=heads,
        num_kv_heads=num_kv_heads,
        head_dim=first.head_dim,
        dtype=str(dtype).removeprefix("torch."),
        parameters=sum(p.numel() for layer in attentions for p in layer.parameters()),
        buffer_bytes=buffer_bytes,
        state_bytes=state_bytes,
        kv_bytes_per_token=len(chosen) * 2 * num_kv_heads * first.head_dim * dtype.itemsize,
    )
    return plan, family


def _choose(conf: Any, config: SRFConfig, layers: Iterable[int] | slice | None) -> list[int]:
    total = conf.num_hidden_layers
    if layers is None:
        picked = None if config.layers is None else list(config.layers)
    elif isinstance(layers, slice):
        picked = list(range(total))[layers]
    else:
        picked = list(layers)
        if any(isinstance(i, bool) or not isinstance(i, int) for i in picked):
            raise TypeError(f"layers must be integers or a slice, got {picked}")
    if picked is not None:
        if not picked:
            raise ValueError("layers is empty: name at least one layer, or None for all of them")
        beyond = [i for i in picked if not -total <= i < total]
        if beyond:
            raise ValueError(f"layer(s) {beyond} do not exist: the model has layers 0 to {total - 1}")
        picked = [i % total for i in picked]
    return choose_layers(conf, picked)


def _supported(model: Any) -> Family:
    known = ", ".join(f.head.__name__ for f in FAMILIES)
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a Transformers model, got {type(model).__name__}")
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        raise TypeError(
            "the model is wrapped by PEFT: merge the adapters first (model = model.merge_and_unload()), or pass "
            "model.get_base_model(), which is changed in place inside its wrapper"
        )
    family = find_family(model)
    if family is not None:
        return family
    if getattr(getattr(model, "config", None), "model_type", "").startswith("srf_"):
        raise TypeError(
            f"this {type(model).__name__} runs the code of its checkpoint: import srf_retrofit before loading it"
        )
    if not isinstance(model, PreTrainedModel) and any(isinstance(m, PreTrainedModel) for m in model.modules()):
        raise TypeError(f"the model is wrapped in a {type(model).__name__}: pass the model inside it")
    raise TypeError(f"{type(model).__name__} is not supported; supported are {known} and their base models")


def _is_retrofitted(model: PreTrainedModel, family: Family) -> bool:
    return isinstance(model, (family.srf_model, family.srf_head)) or bool(srf_attentions(model))


def _check_quantised(model: PreTrainedModel) -> None:
    method = str(getattr(getattr(model, "quantization_method", None), "value", ""))
    marked = getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None
    if (marked and method != "gguf") or not all(p.is_floating_point() for p in model.parameters()):
        raise ValueError(
            f"the model is quantised{f' ({method})' if method else ''}: retrofit it in floating point "
            "(model = model.dequantize(), or load it without a quantization_config) and quantise afterwards"
        )


def _check_weights(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{name} is on the meta device: load the weights first, onto devices that hold them all (no disk or "
                "CPU offloading), and retrofit then"
            )
        # Extremes carry NaN along, and cost far less than a mask over all values.
        if parameter.numel() and not bool(torch.stack(parameter.detach().aminmax()).isfinite().all()):
            raise ValueError(f"{name} has values that are not finite: the model is damaged")


def _configs(model: PreTrainedModel) -> list[Any]:
    """The configuration objects that the model's parts hold: usually one and the same."""
    parts: list[Any] = [model, model.base_model, *_attentions(model, range(model.config.num_hidden_layers))]
    return list({id(part.config): part.config for part in parts}.values())


def _attentions(model: PreTrainedModel, layers: Iterable[int]) -> list[Any]:
    base: Any = model.base_model
    return [base.layers[i].self_attn for i in layers]


def _clear_gguf_marks(model: PreTrainedModel) -> None:
    """Forget, until `revert`, that dequantised weights came from a GGUF file: saving and training refuse otherwise."""
    if not getattr(model, "is_quantized", False):
        return
    marks = {name: model.__dict__[name] for name in _GGUF_MARKS if name in model.__dict__}
    for name in marks:
        delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        marks["quantization_config"] = model.config.quantization_config
        del model.config.quantization_config
    model.__dict__["_srf_gguf_marks"] = marks


@contextlib.contextmanager
def _without_hooks(model: PreTrainedModel, layers: tuple[int, ...]) -> Iterator[None]:
    """Take accelerate's hooks off the attention layers while their class changes: they hold on to the old forward."""
    hooked = [layer for layer in _attentions(model, layers) if hasattr(layer, "_hf_hook")]
    if not hooked:
        yield
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    hooks = [layer._hf_hook for layer in hooked]
    for layer in hooked:
        remove_hook_from_module(layer)
        layer.__dict__.pop("forward", None)  # the class's, which accelerate leaves bound to the object
    try:
        yield
    finally:
        for layer, hook in zip(hooked, hooks, strict=True):
            add_hook_to_module(layer, hook)
