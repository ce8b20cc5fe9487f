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
    `SRFConfig` and not of `kind` go into it.

    Raises
    ------
    ValueError
        For an unknown setting, a value of the wrong type, or one that `kind` or `SRFConfig` refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(recipe) - set(fields))
    if unknown:
        raise ValueError(f"unknown setting(s) {', '.join(map(str, unknown))}; known: {', '.join(sorted(fields))}")
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
        values[name] = _typed(fields[name], value)
    return kind(**values)


def _typed(field: dataclasses.Field, value: Any) -> Any:
    """Check a value against the annotation of its field; lists become tuples, whole numbers floats."""
    kinds = str(field.type)
    if value is None and "None" in kinds:
        return None
    checks: list[tuple[str, type | tuple[type, ...]]] = [
        ("tuple", (list, tuple)),
        ("bool", bool),
        ("int", int),
        ("float", (int, float)),
        ("str", (str, Path)),
        ("SRFConfig", SRFConfig),
    ]
    name, wanted = next((n, t) for n, t in checks if kinds.startswith(n))
    if not isinstance(value, wanted) or (isinstance(value, bool) and name != "bool"):
        remedy = " (in YAML write 1.0e-4, with the dot)" if name == "float" else ""
        raise ValueError(f"{field.name} must be {'a list' if name == 'tuple' else name}, got {value!r}{remedy}")
    return {"tuple": tuple, "float": float, "str": str}.get(name, lambda x: x)(value)


def to_dict(settings: Any) -> dict[str, Any]:
    """Settings as JSON types, to be saved beside what they produced."""
    out = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    if "srf" in out:
        out["srf"] = out["srf"].to_dict()
    return {name: list(value) if isinstance(value, tuple) else value for name, value in out.items()}
