"""How a retrofitted language model takes part in Transformers' `generate`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import masking_utils
from transformers.cache_utils import Cache, DynamicCache

from .attention import MASK_KEY, srf_attentions
from .cache import srf_cache_layer
from .packing import padding_mask


class SRFGenerationMixin:
    """Fills the caches of `generate` with recurrent states, and refuses what a recurrent state cannot do."""

    # Transformers' word for "tokens cannot be taken back": it refuses assisted and prompt-lookup decoding.
    _is_stateful = True

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in Transformers, and keeps the padding mask of the new tokens, which static caches turn into others."""
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        tokens = inputs.get("inputs_embeds")
        tokens = inputs["input_ids"] if tokens is None else tokens
        mask = None
        if attention_mask is not None:
            mask = padding_mask(attention_mask, tokens.shape[0], tokens.shape[1])
        inputs[MASK_KEY] = mask
        return inputs

    def create_masks_for_generate(self, *args: Any, **kwargs: Any) -> Any:
        """Masks of the softmax layers under a static cache; none if there is no such layer."""
        if self._is_pure():
            return None
        return masking_utils.create_masks_for_generate(*args, **kwargs)

    def _is_pure(self) -> bool:
        base = self.base_model  # type: ignore[attr-defined]
        return sum(not layer.exact for layer in srf_attentions(base)) == len(base.layers)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any):
        if getattr(generation_config, "is_assistant", False):
            raise ValueError(
                f"a {type(self).__name__} cannot be the assistant of assisted decoding: rejected tokens cannot be "
                "taken out of its state"
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        cache = model_kwargs.get("past_key_values")
        if not isinstance(cache, Cache):
            return
        batch_size = args[1] if len(args) > 1 else kwargs["batch_size"]
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        for attention in srf_attentions(self):  # type: ignore[arg-type]
            if attention.exact:
                continue
            layer = srf_cache_layer(cache, attention.layer_idx, attention.srf_config)
            if isinstance(cache, DynamicCache) or layer.state is not None:
                continue
            # In a static cache the state stands ready before the first, perhaps compiled, forward.
            features = attention.attn_fn
            like = torch.empty(
                rows, features.num_kv_heads, 0, features.head_dim,
                dtype=self.dtype, device=features.device,  # type: ignore[attr-defined]
            )  # fmt: skip
            layer.lazy_initialization(like, like)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: its paged cache would run these layers without their state, and give another answer."""
        raise ValueError(
            "continuous batching keeps pages of keys and values, not recurrent states: use generate() on a padded "
            "batch, whose rows do not influence each other"
        )
