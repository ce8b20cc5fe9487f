"""The output of a run in stages: what is finished stays, and an interrupted run goes on after it.

OUTPUT/recipe.json       the settings the run was begun with
OUTPUT/progress.json     a line for every finished stage
OUTPUT/stages/NN-name/   what the stage left: its result in stage.json, perhaps a model
OUTPUT/checkpoints/      of the stage that is running
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import atomic_directory, check_writable, write_json

RECIPE, PROGRESS, STAGE = "recipe.json", "progress.json", "stage.json"


class RunDirectory:
    """One output directory; nothing is written before `begin`.

    Parameters
    ----------
    path : path
    settings : dict
        Of JSON types: what the run is told to do.
    changeable : tuple of str
        Names of settings that may differ from those the output was begun with.
    overwrite, resume : bool

    Raises
    ------
    ValueError
        When there is something in the directory that may not be replaced, or it was begun with other settings.
    """

    def __init__(
        self,
        path: str | Path,
        settings: dict[str, Any],
        *,
        changeable: tuple[str, ...] = (),
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        self.path, self.settings = Path(path), settings
        self.finished: list[dict[str, Any]] = []
        self._replace = False
        begun = (self.path / RECIPE).is_file()
        if resume and begun:
            self._compare(changeable)
            self.finished = self._progress()
            return
        if begun and not overwrite:
            raise ValueError(
                f"output {self.path} holds a run already: go on with it by resume (--resume), replace it by overwrite "
                "(--overwrite), or choose another"
            )
        check_writable(self.path, overwrite=overwrite, mark=RECIPE)
        self._replace = begun

    def begin(self) -> None:
        """Make the directory, or clear an earlier run out of the way; a run that is resumed stays."""
        if self._replace:
            old = self.path.with_name(f".{self.path.name}.old-{time.time_ns()}")
            self.path.rename(old)
            shutil.rmtree(old, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / RECIPE).is_file():
            write_json(self.path / RECIPE, self.settings)

    def finish(
        self,
        number: int,
        name: str,
        result: dict[str, Any],
        seconds: float,
        save: Callable[[Path], None] | None = None,
    ) -> None:
        """Keep what a stage made, whole or not at all, and only then count it as finished.

        Parameters
        ----------
        number, name
            From 1.
        result : dict
            Of JSON types.
        seconds : float
        save : callable, optional
            Writes further files into the directory it is given.
        """
        with atomic_directory(self._stage(number, name), overwrite=True, mark=STAGE) as scratch:
            if save is not None:
                save(scratch)
            write_json(scratch / STAGE, {"number": number, "name": name, "result": result})
        self.finished.append(
            {"number": number, "name": name, "directory": f"stages/{number:02}-{name}", "seconds": round(seconds, 2)}
        )
        write_json(self.path / PROGRESS, {"stages": self.finished})
        shutil.rmtree(self.checkpoints(number, name), ignore_errors=True)
        with contextlib.suppress(OSError):
            self.checkpoints(number, name).parent.rmdir()  # as long as nothing else is in it

    def checkpoints(self, number: int, name: str) -> Path:
        """Where a stage may keep checkpoints of its own until it is finished."""
        return self.path / "checkpoints" / f"{number:02}-{name}"

    def result(self, number: int) -> dict[str, Any]:
        """What finished stage `number` returned."""
        line = self.finished[number - 1]
        return json.loads((self.path / line["directory"] / STAGE).read_text(encoding="utf-8"))["result"]

    def latest(self, what: str) -> Path | None:
        """The newest file or directory of this name that a finished stage left."""
        found = [p for line in self.finished if (p := self.path / line["directory"] / what).exists()]
        return found[-1] if found else None

    def _stage(self, number: int, name: str) -> Path:
        return self.path / "stages" / f"{number:02}-{name}"

    def _compare(self, changeable: tuple[str, ...]) -> None:
        old = _flat(_read(self.path / RECIPE))
        new = _flat(self.settings)
        changed = [
            f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
            for name in {**old, **new}
            if old.get(name) != new.get(name) and name.partition(".")[0] not in changeable
        ]
        if changed:
            raise ValueError(
                f"output {self.path} was begun with other settings: {'; '.join(changed)}: resume with the same, or "
                "choose another output"
            )

    def _progress(self) -> list[dict[str, Any]]:
        if not (self.path / PROGRESS).is_file():
            return []
        lines = _read(self.path / PROGRESS).get("stages", [])
        for number, line in enumerate(lines, 1):
            directory = self.path / str(line.get("directory"))
            if line.get("number") != number or not (directory / STAGE).is_file():
                raise ValueError(f"{self.path / PROGRESS} names a stage that is not there ({directory}): start anew")
        return lines


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): start anew with overwrite") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not of this package: choose another output")
    return found


def _flat(settings: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    out: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            out.update(_flat(value, f"{before}{name}."))
        else:
            out[f"{before}{name}"] = value
    return out
