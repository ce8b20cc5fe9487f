"""Retrofit pretrained Llamas with simplex-random-feature attention: a decoding state of constant size.

Importing this package registers the retrofitted model classes with Transformers' Auto classes, and does nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .calibration import calibrate, calibrate_all, calibrate_foresight, calibrate_gain, calibrate_slots
from .modeling.attention import ablated_attention, exact_attention
from .modeling.cache import state_bytes
from .modeling.configuration import SRFConfig
from .modeling.standalone import Attention
from .plan import RetrofitPlan
from .surgery import plan_retrofit, retrofit, revert

if TYPE_CHECKING:
    from .training.callbacks import ResampleFeaturesCallback, resample_features

__version__ = "0.1.0"

__all__ = [
    "Attention",
    "ResampleFeaturesCallback",
    "RetrofitPlan",
    "SRFConfig",
    "ablated_attention",
    "calibrate",
    "calibrate_all",
    "calibrate_foresight",
    "calibrate_gain",
    "calibrate_slots",
    "exact_attention",
    "plan_retrofit",
    "resample_features",
    "retrofit",
    "revert",
    "state_bytes",
]


def __getattr__(name: str) -> Any:
    """The callback's names on first use: they bring the Trainer, and with it PEFT, which few need at once."""
    if name in ("ResampleFeaturesCallback", "resample_features"):
        from .training import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
