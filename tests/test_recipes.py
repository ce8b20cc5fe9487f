"""Defaults < YAML < command line, and every mistake in a recipe is named."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from srf_retrofit import recipes
from srf_retrofit.modeling.configuration import SRFConfig


@dataclass(frozen=True)
class Job:
    model: str = "smollm2"
    text: str | None = None
    steps: int = 10
    learning_rate: float = 1e-4
    contexts: tuple[int, ...] = (1, 2)
    srf: SRFConfig = field(default_factory=lambda: SRFConfig(window=16))


def test_precedence(tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("steps: 20\nlearning_rate: 1\ncontexts: [4]\nsrf: {sinks: 2, retained: 8}\n")
    job = recipes.resolve(Job, recipes.read_recipe(path), steps=30, text=None, retained=5)
    assert job == Job(steps=30, learning_rate=1.0, contexts=(4,), srf=SRFConfig(window=16, sinks=2, retained=5))
    assert recipes.resolve(Job, {}) == Job()
    assert recipes.to_dict(job)["srf"]["window"] == 16
    assert recipes.resolve(Job, recipes.to_dict(job)) == job


@dataclass(frozen=True)
class Part:
    size: int = 3
    kind: str = "plain"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be >= 1, got {self.size}")


@dataclass(frozen=True)
class Whole:
    text: str | tuple[str, ...] | None = None
    share: float | None = None
    part: Part = field(default_factory=lambda: Part(size=5))


def test_nested_settings_and_unions() -> None:
    whole = recipes.resolve(Whole, {"text": ["a", "b"], "share": 1, "part": {"kind": "fine"}})
    assert whole == Whole(text=("a", "b"), share=1.0, part=Part(5, "fine"))
    assert recipes.resolve(Whole, {"text": "a", "part": None}) == Whole(text="a")
    assert recipes.to_dict(whole) == {"text": ["a", "b"], "share": 1.0, "part": {"size": 5, "kind": "fine"}}
    assert recipes.resolve(Whole, recipes.to_dict(whole)) == whole
    for recipe, message in (
        ({"text": 3}, "text must be str or a list, got 3"),
        ({"part": 3}, "part must be a mapping, got int"),
        ({"part": {"sise": 3}}, "part: unknown setting.*sise"),
        ({"part": {"size": 0}}, "part: size must be >= 1"),
        ({"share": "half"}, "share must be float, got 'half'"),
    ):
        with pytest.raises(ValueError, match=message):
            recipes.resolve(Whole, recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "unknown setting.*stepz; known: contexts"),
        ("steps: many", "steps must be int, got 'many'"),
        ("steps: true", "steps must be int, got True"),
        ("learning_rate: 1e-4", "with the dot"),
        ("contexts: 5", "contexts must be a list"),
        ("model: null", "model must be str"),
        ("srf: [1]", "srf must be a mapping"),
        ("srf: {windows: 3}", "unknown SRF configuration field"),
        ("srf: {window: -1}", "window must be >= 0, got -1"),
        ("- 1", "must hold a mapping"),
        ("a: [", "is not YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        recipes.resolve(Job, recipes.read_recipe(path))


def test_missing_and_empty(tmp_path) -> None:
    with pytest.raises(ValueError, match="no such recipe"):
        recipes.read_recipe(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert recipes.read_recipe(tmp_path / "empty.yaml") == recipes.read_recipe(None) == {}
