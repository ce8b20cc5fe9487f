"""Transformers configurations of the retrofitted families: the original one plus an `srf` dictionary.

They are subclasses with model types of their own (`srf_llama`, ...), so that a checkpoint opened without this code is
refused instead of loaded as a softmax model.
"""

# Annotations stay evaluated here: the configuration classes are dataclasses validated by their type hints.
from collections.abc import Iterable
from typing import Any

from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from .configuration import SRFConfig


def choose_layers(config: PreTrainedConfig, layers: Iterable[int] | None) -> list[int]:
    """Check a choice of layers (`None`: every layer that sees its whole past) against a model's configuration.

    Layers with sliding-window attention never qualify: their window is part of what was learned, and their cache has
    a constant size already.

    Raises
    ------
    ValueError
        When a chosen layer has a sliding window, or when every layer has one.
    """
    types = getattr(config, "layer_types", None)
    if types is None:
        sliding = getattr(config, "sliding_window", None) is not None
        types = ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers
    full = [i for i, kind in enumerate(types) if kind == "full_attention"]
    if layers is None:
        if not full:
            raise ValueError(
                "every layer of this model has sliding-window attention, whose cache is constant already; to "
                "replace it all the same, make it full attention first: config.sliding_window = None"
            )
        return full
    other = sorted(set(layers) - set(full))
    if other:
        raise ValueError(
            f"layer(s) {other} do not have full attention ({types[other[0]]}): leave them out, they keep their own"
        )
    return sorted(set(layers))


class SRFConfigMixin:
    """Reads and checks `srf`, the dictionary form of `SRFConfig`; `None` means its defaults.

    Raises
    ------
    ValueError
        When a field is unknown or out of range, a layer does not exist, or the version is newer than this code.
    """

    def __post_init__(self: Any, **kwargs: Any) -> None:
        # A softmax model's configuration file, read by this class, must not pass its own type on.
        kwargs.pop("model_type", None)
        srf = SRFConfig.from_dict({} if self.srf is None else self.srf)
        self.srf = srf.to_dict()
        super().__post_init__(**kwargs)  # type: ignore[misc]
        srf.check_shape(self.num_hidden_layers, self.num_key_value_heads)
        srf.check_head_dim(getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads)

    @property
    def srf_config(self: Any) -> SRFConfig:
        """The attention's hyper-parameters, validated."""
        return SRFConfig.from_dict(self.srf)

    @property
    def srf_layers(self: Any) -> list[int]:
        """Indices of the layers that carry random features; the others keep softmax attention.

        Raises
        ------
        ValueError
            When `srf` names a sliding-window layer, or when there is no other.
        """
        return choose_layers(self, self.srf_config.layers)


class SRFLlamaConfig(SRFConfigMixin, LlamaConfig):
    """`LlamaConfig` with an `srf` dictionary (`SRFConfig.to_dict`)."""

    model_type = "srf_llama"
    _auto_class = "AutoConfig"
    srf: dict | None = None  # type: ignore[assignment]


class SRFMistralConfig(SRFConfigMixin, MistralConfig):
    """`MistralConfig` with an `srf` dictionary (`SRFConfig.to_dict`)."""

    model_type = "srf_mistral"
    _auto_class = "AutoConfig"
    srf: dict | None = None  # type: ignore[assignment]


class SRFQwen2Config(SRFConfigMixin, Qwen2Config):
    """`Qwen2Config` with an `srf` dictionary (`SRFConfig.to_dict`)."""

    model_type = "srf_qwen2"
    _auto_class = "AutoConfig"
    srf: dict | None = None  # type: ignore[assignment]


class SRFQwen3Config(SRFConfigMixin, Qwen3Config):
    """`Qwen3Config` with an `srf` dictionary (`SRFConfig.to_dict`)."""

    model_type = "srf_qwen3"
    _auto_class = "AutoConfig"
    srf: dict | None = None  # type: ignore[assignment]
