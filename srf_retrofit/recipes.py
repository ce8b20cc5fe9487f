"""Settings in three layers: defaults in a dataclass, over them a YAML recipe, over that the command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .modeling.configuration import SRFConfig

Settings = TypeVar("Settings")


def read_recipe(path: str | Path | None) -> dict[str, Any]:
    """The mapping in a YAML file; empty for None.

    Raises
    ------
    ValueError
        For a missing file, YAML that cannot be parsed, or anything but a mapping.
    """
    if path is None:
        return {}
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such recipe: {path}")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold a mapping of settings, got {type(recipe).__name__}")
    return recipe


def resolve(kind: type[Settings], recipe: dict[str, Any], **given: Any) -> Settings:
    """Settings of dataclass `kind`: its defaults, then `recipe`, then every `given` value that is not None.

    A field named `srf` is an `SRFConfig`; the recipe gives it as a mapping, and given names that are fields of
    `SRFConfig` and not of `kind` go into it. Any other field whose default is a dataclass is given as a mapping too,
    laid over that default.

    Raises
    ------
    ValueError
        For an unknown setting, a value of the wrong type, or one that `kind` or `SRFConfig` refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(map(str, set(recipe) - set(fields)))
    if unknown:
        raise ValueError(f"unknown setting(s) {', '.join(unknown)}; known: {', '.join(sorted(fields))}")
    values = dict(recipe)
    srf = values.pop("srf", None) or {}
    if not isinstance(srf, dict):
        raise ValueError(f"srf must be a mapping, got {type(srf).__name__}")
    srf = dict(srf)
    for name, value in given.items():
        if value is None:
            continue
        (values if name in fields else srf)[name] = value
    if "srf" in fields:
        # The defaults of this job, which may differ from the operator's own.
        base = fields["srf"].default_factory() if callable(fields["srf"].default_factory) else SRFConfig()
        values["srf"] = SRFConfig.from_dict({**base.to_dict(), **srf})
    for name, value in values.items():
        nested = _nested_default(fields[name])
        values[name] = _typed(fields[name], value) if nested is None else _nested(name, nested, value)
    return kind(**values)


def _nested_default(field: dataclasses.Field) -> Any:
    """The settings that a field has by default, where these are a dataclass other than `SRFConfig`."""
    if not callable(field.default_factory):
        return None
    default = field.default_factory()
    return default if dataclasses.is_dataclass(default) and not isinstance(default, SRFConfig) else None


def _nested(name: str, default: Any, value: Any) -> Any:
    """A mapping, or None for nothing, over the default settings of a field."""
    if isinstance(value, type(default)):
        return value
    if not isinstance(value, dict | None):
        raise ValueError(f"{name} must be a mapping, got {type(value).__name__}")
    try:
        return resolve(type(default), {**to_dict(default), **(value or {})})
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


# What a value must be, by the name of a type as annotations write it.
_KINDS: dict[str, type | tuple[type, ...]] = {
    "tuple": (list, tuple),
    "bool": bool,
    "int": int,
    "float": (int, float),
    "str": (str, Path),
    "SRFConfig": SRFConfig,
}
_MADE: dict[str, Any] = {"tuple": tuple, "float": float, "str": str}


def _typed(field: dataclasses.Field, value: Any) -> Any:
    """Check a value against the annotation of its field, unions included; lists become tuples, whole numbers floats."""
    kinds = [kind.strip() for kind in str(field.type).split("|")]
    if value is None and "None" in kinds:
        return None
    names = [kind.partition("[")[0] for kind in kinds if kind != "None"]
    for name in names:
        if _fits(name, value):
            return _MADE.get(name, lambda x: x)(value)
    remedy = " (in YAML write 1.0e-4, with the dot)" if "float" in names else ""
    wanted = " or ".join("a list" if name == "tuple" else name for name in names)
    raise ValueError(f"{field.name} must be {wanted}, got {value!r}{remedy}")


def _fits(name: str, value: Any) -> bool:
    return isinstance(value, _KINDS[name]) and (name == "bool" or not isinstance(value, bool))


def to_dict(settings: Any) -> dict[str, Any]:
    """Settings as JSON types, to be saved beside what they produced."""
    out = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    for name, value in out.items():
        if isinstance(value, SRFConfig):
            out[name] = value.to_dict()
        elif dataclasses.is_dataclass(value):
            out[name] = to_dict(value)
        elif isinstance(value, tuple):
            out[name] = list(value)
    return out
