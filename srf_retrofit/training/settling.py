"""From random features to trained ones, in place: the end of every resampling schedule."""

from __future__ import annotations

from torch import nn

from ..modeling.attention import SRFAttention, record, srf_attentions
from ..modeling.features import SRFFeatures
from ..modeling.learned_maps import LearnedMaps


def settle_features(model: nn.Module) -> int:
    """Turn the random features of every retrofitted layer into feature maps that are trained like any weight.

    The model computes the same afterwards; `feature_map` of its configuration becomes "trained", and its checkpoints
    hold the maps instead of draw and geometry. Optimizers made before do not know the new parameters: settle first.

    Parameters
    ----------
    model : PreTrainedModel, wrapped or not
        With retrofitted layers.

    Returns
    -------
    int
        Number of layers that were settled; layers without features stay as they are.

    Raises
    ------
    ValueError
        When no layer has random features.
    """
    layers = [layer for layer in srf_attentions(model) if _has_random_features(layer)]
    if not layers:
        raise ValueError(
            f"this {type(model).__name__} has no random features to settle: retrofit it, or it has settled"
        )
    maps = [LearnedMaps.settle(layer.attn_fn) for layer in layers]  # type: ignore[arg-type]
    for layer, settled in zip(layers, maps, strict=True):
        layer.attn_fn = settled.train(layer.training)
        layer.srf_config = settled.config
    record(model, feature_map="trained")
    return len(layers)


def _has_random_features(layer: SRFAttention) -> bool:
    return isinstance(layer.attn_fn, SRFFeatures) and layer.srf_config.num_features > 0
