"""What a retrofitted model is told by a few thousand tokens before any training, in closed form.

`foresight` of which keys are worth a slot, `geometry` of the features, `gain` of each head's features; then `slots`
that each head gets, which looks at all three, and `gain` once more. `observation` runs the text.
"""

from __future__ import annotations

from .all_fits import Calibrations, calibrate_all
from .foresight import calibrate_foresight, least_row
from .gain import calibrate_gain
from .geometry import (
    DEFAULT_GEOMETRY,
    GEOMETRIES,
    CalibrationReport,
    Geometry,
    LayerMoments,
    Moments,
    balance,
    calibrate,
    fit_geometry,
    second_moments,
)
from .slots import SLOTS_BY, calibrate_slots

__all__ = [
    "DEFAULT_GEOMETRY",
    "GEOMETRIES",
    "SLOTS_BY",
    "CalibrationReport",
    "Calibrations",
    "Geometry",
    "LayerMoments",
    "Moments",
    "balance",
    "calibrate",
    "calibrate_all",
    "calibrate_foresight",
    "calibrate_gain",
    "calibrate_slots",
    "fit_geometry",
    "least_row",
    "second_moments",
]
