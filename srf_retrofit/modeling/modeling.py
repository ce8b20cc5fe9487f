"""Retrofitted model classes: one base model and one causal language model per family.

Each is a subclass of the Transformers class it came from and adds no weights of its own; the mixins here decide what
the layers are told (padding, documents, positions), how caches are filled, and what is refused.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralForCausalLM, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3Model
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .attention import (
    DOCUMENTS_KEY,
    MASK_KEY,
    SRFAttention,
    SRFLlamaAttention,
    SRFMistralAttention,
    SRFQwen2Attention,
    SRFQwen3Attention,
    srf_attentions,
)
from .configuration_hf import SRFLlamaConfig, SRFMistralConfig, SRFQwen2Config, SRFQwen3Config
from .features import SRFFeatures
from .forget_gate import ForgetGate
from .generation import SRFGenerationMixin
from .learned_maps import LearnedMaps
from .packing import document_bounds, own_positions, padding_mask
from .saving import whole_or_nothing

_NO_ATTENTIONS = (
    "output_attentions=True is not possible: random features never form the attention matrix. Run the model inside "
    "exact_attention(model) with attn_implementation='eager' to see the softmax one"
)


class SRFPreTrainedMixin:
    """What base model and language model share: construction, initialisation, loading and saving."""

    _supports_attention_backend = False

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        # Transformers' own __init__ has built, and initialised, the softmax model.
        become_srf(self)  # type: ignore[arg-type]
        self.post_init()  # type: ignore[attr-defined]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (SRFFeatures, LearnedMaps, ForgetGate)):
            for name, value in module.initial_values().items():
                init.copy_(getattr(module, name), value)
        else:
            super()._init_weights(module)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers; weights of the softmax model are taken with a fresh draw of features.

        Raises
        ------
        ValueError
            When a checkpoint has only a part of the features, or features that are not finite: it is damaged.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        _check_features(model, info["missing_keys"], pretrained_model_name_or_path)
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in Transformers, with the code that runs the checkpoint, and whole or not at all.

        The files are written beside `save_directory` and moved there at the end. Distributed checkpoints
        (`distributed_checkpoint=True`), which every process writes a part of, are written in place.

        Raises
        ------
        OSError
            When it cannot be written; nothing is left behind then.
        """
        save = super().save_pretrained  # type: ignore[misc]
        with _described_for_auto_classes(self.config):  # type: ignore[attr-defined]
            if kwargs.get("distributed_checkpoint"):
                save(save_directory, *args, **kwargs)
                return
            if kwargs.get("push_to_hub"):
                kwargs.setdefault("repo_id", os.path.basename(os.path.abspath(save_directory)))
            with whole_or_nothing(save_directory) as staging:
                save(staging, *args, **kwargs)


class SRFModelMixin(SRFPreTrainedMixin):
    """The base model: prepares mask, documents and positions once for all its layers."""

    _auto_class: Any = "AutoModel"

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As in Transformers, except for what random features need.

        Parameters
        ----------
        attention_mask : (B, L) or (B, past + L), optional
            Padding in any pattern; the last `L` columns are read. Masks of other shapes are refused: which key a
            query sees cannot be chosen freely.
        position_ids : (B, L), optional
            By default each row counts its own real tokens, so that padding on the left changes nothing. Without a
            mask and a cache, a position that does not follow from the one before it starts another document.
        **kwargs
            `cu_seq_lens_q` and `cu_seq_lens_k` (N + 1,) are the bounds of documents packed into one row.

        Raises
        ------
        ValueError
            For what cannot be done: attention matrices, masks that are no padding, packing with padding or a cache,
            features redrawn at every call under gradient checkpointing.
        """
        attentions = srf_attentions(self)  # type: ignore[arg-type]
        live = [layer for layer in attentions if not layer.exact]
        self._redraw(live)
        call = {"use_cache": use_cache, "past_key_values": past_key_values, "inputs_embeds": inputs_embeds}
        if not live:
            kwargs[MASK_KEY] = None if attention_mask is None or attention_mask.dim() != 2 else attention_mask != 0
            return super().forward(input_ids, attention_mask, position_ids, **call, **kwargs)  # type: ignore[misc]
        if kwargs.get("output_attentions", self.config.output_attentions):  # type: ignore[attr-defined]
            raise ValueError(_NO_ATTENTIONS)

        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None:
            raise ValueError("give either input_ids or inputs_embeds")
        b, length = tokens.shape[:2]
        prepared = MASK_KEY in kwargs
        mask = padding_mask(kwargs.pop(MASK_KEY, None) if prepared else attention_mask, b, length)
        bounds = document_bounds(position_ids, mask, past_key_values, kwargs, b, length)
        if bounds is not None:
            if use_cache or past_key_values is not None:
                raise ValueError("packed documents leave no single state to continue from: pass use_cache=False")
            call["use_cache"] = False
            # Softmax layers of a hybrid see the documents by their positions, if there is no mask.
            attention_mask = None
        if position_ids is None or "cu_seq_lens_q" in kwargs:
            position_ids = own_positions(mask, bounds, past_key_values, b, length, tokens.device)
        if len(live) == len(self.layers):  # type: ignore[attr-defined]
            # A placeholder of four dimensions counts as a mask prepared elsewhere: none of size L x L is built.
            attention_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
        kwargs |= {MASK_KEY: mask, DOCUMENTS_KEY: bounds}
        return super().forward(input_ids, attention_mask, position_ids, **call, **kwargs)  # type: ignore[misc]

    def _redraw(self, live: list[SRFAttention]) -> None:
        if not self.training:  # type: ignore[attr-defined]
            return
        for layer in live:
            if isinstance(layer.attn_fn, SRFFeatures) and layer.attn_fn.redraw_on_call:
                if any(getattr(block, "gradient_checkpointing", False) for block in self.layers):  # type: ignore[attr-defined]
                    raise ValueError(
                        "redraw_on_call_(True) under gradient checkpointing could change features between a forward "
                        "and its recomputation: call redraw_on_call_(False) and redraw_() between optimizer steps"
                    )
                layer.attn_fn.redraw_()


class SRFForCausalLMMixin(SRFGenerationMixin, SRFPreTrainedMixin):
    """The language model: a base model with caches filled for `generate`."""

    _auto_class: Any = "AutoModelForCausalLM"


class SRFLlamaModel(SRFModelMixin, LlamaModel):
    """`LlamaModel` whose chosen layers attend by random features."""

    config_class = SRFLlamaConfig


class SRFLlamaForCausalLM(SRFForCausalLMMixin, LlamaForCausalLM):
    """`LlamaForCausalLM` whose chosen layers attend by random features."""

    config_class = SRFLlamaConfig


class SRFMistralModel(SRFModelMixin, MistralModel):
    """`MistralModel` whose layers attend by random features; without a sliding window."""

    config_class = SRFMistralConfig


class SRFMistralForCausalLM(SRFForCausalLMMixin, MistralForCausalLM):
    """`MistralForCausalLM` whose layers attend by random features; without a sliding window."""

    config_class = SRFMistralConfig


class SRFQwen2Model(SRFModelMixin, Qwen2Model):
    """`Qwen2Model` whose chosen full-attention layers attend by random features."""

    config_class = SRFQwen2Config


class SRFQwen2ForCausalLM(SRFForCausalLMMixin, Qwen2ForCausalLM):
    """`Qwen2ForCausalLM` whose chosen full-attention layers attend by random features."""

    config_class = SRFQwen2Config


class SRFQwen3Model(SRFModelMixin, Qwen3Model):
    """`Qwen3Model` whose chosen full-attention layers attend by random features."""

    config_class = SRFQwen3Config


class SRFQwen3ForCausalLM(SRFForCausalLMMixin, Qwen3ForCausalLM):
    """`Qwen3ForCausalLM` whose chosen full-attention layers attend by random features."""

    config_class = SRFQwen3Config


class Family(NamedTuple):
    """The classes of one family, each as it was and as it becomes."""

    config: type[PreTrainedConfig]
    srf_config: type[PreTrainedConfig]
    attention: type[SRFAttention]
    model: type[PreTrainedModel]
    srf_model: type[PreTrainedModel]
    head: type[PreTrainedModel]
    srf_head: type[PreTrainedModel]


FAMILIES = (
    Family(
        LlamaConfig, SRFLlamaConfig, SRFLlamaAttention, LlamaModel, SRFLlamaModel, LlamaForCausalLM, SRFLlamaForCausalLM
    ),
    Family(
        MistralConfig, SRFMistralConfig, SRFMistralAttention,
        MistralModel, SRFMistralModel, MistralForCausalLM, SRFMistralForCausalLM,
    ),
    Family(
        Qwen2Config, SRFQwen2Config, SRFQwen2Attention,
        Qwen2Model, SRFQwen2Model, Qwen2ForCausalLM, SRFQwen2ForCausalLM,
    ),
    Family(
        Qwen3Config, SRFQwen3Config, SRFQwen3Attention,
        Qwen3Model, SRFQwen3Model, Qwen3ForCausalLM, SRFQwen3ForCausalLM,
    ),
)  # fmt: skip


def find_family(model: nn.Module) -> Family | None:
    """The family that a model belongs to, softmax (exactly its class) or retrofitted; `None` if there is none."""
    for family in FAMILIES:
        if type(model) in (family.model, family.head) or isinstance(model, (family.srf_model, family.srf_head)):
            return family
    return None


def become_srf(model: PreTrainedModel) -> None:
    """Turn a model whose configuration is one of ours into the retrofitted classes, in place.

    This is the whole surgery: a change of class for the model, its base model and the attention of the chosen layers.
    Construction and `retrofit` both come here.
    """
    family = find_family(model)
    # Compared by name: code that travels in a checkpoint is imported once for the configuration and once for the model.
    assert family is not None
    assert model.config.model_type == family.srf_config.model_type
    base: Any = model.base_model
    for index in model.config.srf_layers:
        attention = base.layers[index].self_attn
        if not isinstance(attention, SRFAttention):
            family.attention.adopt(attention, model.config.srf_config)
    for part, target in ((base, family.srf_model), (model, family.srf_model if model is base else family.srf_head)):
        if not isinstance(part, target):
            part.__class__ = target
    for part in {id(model): model, id(base): base}.values():
        refresh_records(part)
        part._keep_in_fp32_modules_strict = {*(part._keep_in_fp32_modules_strict or ()), "attn_fn"}
    _tell_peft(family)


def become_softmax(model: PreTrainedModel) -> None:
    """Undo `become_srf`, in place; the configuration is left to the caller."""
    family = find_family(model)
    assert family is not None
    base: Any = model.base_model
    for attention in srf_attentions(base):
        attention.release()
    base.__class__ = family.model
    if model is not base:
        model.__class__ = family.head
    for part in {id(model): model, id(base): base}.values():
        refresh_records(part)
        part._keep_in_fp32_modules_strict = {*(part._keep_in_fp32_modules_strict or ())} - {"attn_fn"}


def refresh_records(model: PreTrainedModel) -> None:
    """Register the outputs (hidden states) that can be captured, which Transformers keeps by name of class."""
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(model)), model._can_record_outputs)


def _tell_peft(family: Family) -> None:
    """Give PEFT the family's default target modules under the new model type, if PEFT has been imported."""
    constants = sys.modules.get("peft.utils.constants")
    for name, mapping in vars(constants).items() if constants is not None else ():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and family.config.model_type in mapping:
            mapping.setdefault(family.srf_config.model_type, mapping[family.config.model_type])


def _check_features(model: PreTrainedModel, missing_keys: Any, where: Any) -> None:
    tensors = {name: t for name, t in (*model.named_buffers(), *model.named_parameters()) if ".attn_fn." in name}
    # Checkpoints of version 2 and before have no foresight: theirs is that of no calibration.
    expected = {name for name in tensors if not name.endswith(".foresight")}
    missing = sorted(expected & set(missing_keys))
    if missing and len(missing) < len(expected):
        raise ValueError(
            f"the checkpoint {where} is damaged: {len(missing)} of {len(expected)} feature tensors are missing, the "
            f"first is {missing[0]}"
        )
    for name, tensor in tensors.items():
        if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"the checkpoint {where} is damaged: {name} has values that are not finite")


@contextlib.contextmanager
def _described_for_auto_classes(config: PreTrainedConfig) -> Iterator[None]:
    """While saving: name every class that the travelling code offers, not only the one being saved."""
    family = next(f for f in FAMILIES if f.srf_config.model_type == config.model_type)
    before = getattr(config, "auto_map", None)
    config.auto_map = {
        "AutoConfig": f"configuration_hf.{family.srf_config.__name__}",
        "AutoModel": f"modeling.{family.srf_model.__name__}",
        "AutoModelForCausalLM": f"modeling.{family.srf_head.__name__}",
    }
    try:
        yield
    finally:
        if before is None:
            del config.auto_map
        else:
            config.auto_map = before
