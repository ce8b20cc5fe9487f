"""Everything that is fitted before training, in the order in which one fit stands on another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..modeling.attention import srf_attentions
from ..modeling.features import SRFFeatures
from .foresight import ForesightReport, calibrate_foresight, least_row
from .gain import GainReport, calibrate_gain
from .geometry import DEFAULT_GEOMETRY, CalibrationReport, calibrate
from .observation import whole_rows
from .slots import SlotsReport, calibrate_slots


@dataclass(frozen=True)
class Calibrations:
    """What each fit found, in their order, the last one of gains; `None` of those that there was nothing to fit for."""

    foresight: ForesightReport | None = None
    geometry: CalibrationReport | None = None
    slots: SlotsReport | None = None
    gains: GainReport | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter(x for x in (self.foresight, self.geometry, self.slots, self.gains) if x is not None)

    def __str__(self) -> str:
        return "\n".join(map(str, self))


def calibrate_all(
    model: PreTrainedModel,
    batches: Any,
    *,
    foresee: bool = True,
    factor: float | None = 1.0,
    geometry: str | None = DEFAULT_GEOMETRY,
    spread_tokens: int = 16384,
    spread_by: str = "head",
    spread_also: Any = (),
    weigh: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Calibrations:
    """Fit all that can be fitted without training: most of what a retrofit loses comes back here.

    Which keys are worth a slot (`calibrate_foresight`), the geometry of the features (`calibrate`), how loud features
    may be (`calibrate_gain`) and whose slots they are (`calibrate_slots`), each where the model has what it is for:
    learned maps keep what they are, a form that retains no keys has no slots. Gains are found twice: features at full
    weight make up a third of what errors cost, and slots would be spread by their noise; but how loud they may be
    depends on what the slots leave to them. Each fit is a pass of the softmax model over the batches, that of the
    slots with gradients of its activations.

    Parameters
    ----------
    model : PreTrainedModel
        A retrofitted causal language model.
    batches : iterable of (B, L) int64, or of mappings with `input_ids`
        Whole rows, without padding, as long as the contexts that matter. Some 16 thousand tokens. Kept in memory.
    foresee, factor : bool, and float or None
        Where rows are long enough, see `least_row`; the factor as in `calibrate_foresight`.
    geometry : str, optional
        As in `calibrate`; `None` keeps the one there is.
    spread_tokens, spread_by
        Tokens, of the first rows, that `calibrate_slots` is given, and its `by`; 0 leaves all heads their slots.
    spread_also : batches, optional
        Further rows for `calibrate_slots` alone. Rows that ask for what stood far back (`recall_data`) give slots to
        the heads that look for it, which text alone seldom needs.
    weigh : bool
        Not in the pure form, where a factor on all features cancels.
    say : callable, optional
        Told of each fit when it is done.

    Returns
    -------
    Calibrations

    Raises
    ------
    TypeError, ValueError
        As the fits do. Those that were done before stay.
    """
    layers = srf_attentions(model)
    if not layers:
        raise ValueError("the model has no retrofitted layer to calibrate: call retrofit(model) first")
    rows = list(whole_rows(batches))
    if not rows:
        raise ValueError("there was no batch to calibrate on: give some thousand tokens")
    length = min(ids.shape[1] for ids in rows)
    retaining = [layer.srf_config for layer in layers if layer.srf_config.retained]
    random = [x.srf_config for x in layers if isinstance(x.attn_fn, SRFFeatures) and x.srf_config.num_features]
    found: dict[str, Any] = {}

    def note(name: str, report: Any) -> None:
        found[name] = report
        say(str(report))

    if foresee and retaining and length > max(map(least_row, retaining)):
        note("foresight", calibrate_foresight(model, rows, factor=factor))
    if random and geometry is not None:
        note("geometry", calibrate(model, rows, geometry=geometry, max_tokens=None))
    weighs = bool(random) and weigh and not random[0].is_pure
    spreads = bool(spread_tokens and retaining)
    if weighs:
        note("gains", calibrate_gain(model, rows))
    if spreads:
        singly = [row for ids in rows for row in ids.split(1)][: max(1, spread_tokens // length)]
        note("slots", calibrate_slots(model, [*singly, *whole_rows(spread_also)], by=spread_by))
    if weighs and spreads:
        note("gains", calibrate_gain(model, rows))
    return Calibrations(**found)
