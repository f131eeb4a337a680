"""Checkpoints: folders ``step-000123`` that are complete or not there.

========================== ==============================================================
``parameters.safetensors`` a weights file like any other, for ``agc convert`` and the like
``momentum.safetensors``   the same form
``ema.safetensors``        the same form; if the recipe has an average
``state.json``             step, recipe and its id, and whatever else is worth knowing
========================== ==============================================================

A sharded checkpoint has a folder ``sharded`` in a framework's own form in place of the arrays. All
hosts write into it, and ``agc checkpoint export`` makes it portable.

A checkpoint is written beside its place, under a name that begins with a dot, and renamed when all
of it is on the disk. A process that is killed leaves such a folder behind; the next checkpoint
removes it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from agc.errors import ConfigError, FormatError, ParameterError
from agc.files import write_text
from agc.nfnet import check_arrays, parameters
from agc.recipe import Recipe
from agc.training.state import State
from agc.weights import load, save
from agc.weights.folders import FACTS, SHARDED, STEP, sharded_way_out

__all__ = ["SCHEMA", "Checkpoints"]

SCHEMA: Final = 1
"""Version of the form."""


class Checkpoints:
    """The checkpoints of one training, of which the last few are kept.

    Parameters
    ----------
    folder : Path
        Where they are; made if it does not exist, in a folder that does.
    recipe : Recipe
        ``checkpoint.keep`` says how many are kept.
    allow_changed : bool
        Whether checkpoints of another recipe may be loaded, if their arrays fit.

    Raises
    ------
    ConfigError
        If nothing can be written there; the message has the reason.
    """

    def __init__(self, folder: Path, recipe: Recipe, *, allow_changed: bool = False) -> None:
        self._folder, self._recipe = folder, recipe
        self._allow_changed = allow_changed
        self._options = recipe.model.options()
        trial = folder / f".{secrets.token_hex(4)}.part"
        try:
            folder.mkdir(exist_ok=True)
            trial.mkdir()
            trial.rmdir()
        except OSError as error:
            parent = folder.parent
            reason = error if parent.exists() else f"make the folder {parent} first; there is none"
            raise ConfigError(f"checkpoints cannot be written to {folder}: {reason}") from None

    def steps(self) -> list[int]:
        """Return the steps of which there are complete checkpoints, ascending."""
        names = (STEP.fullmatch(path.name) for path in self._folder.iterdir() if path.is_dir())
        return sorted(int(name[1]) for name in names if name)

    def path(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self._folder / f"step-{step:06d}"

    def save(self, state: State) -> Path:
        """Write a checkpoint, and remove those that are not kept; return its folder.

        Raises
        ------
        NonFiniteError
            If a number is NaN or infinite: nothing is written, and the older checkpoints stay.
        ParameterError
            If the arrays are not those of the recipe's model, in its dtype; nothing is written.
        OSError
            If the disk is full, or the like; the older checkpoints stay.
        """
        self._check(state, "the state to be saved")
        state.check_finite()
        self._remove_parts()
        part = self._folder / f".{self.path(state.step).name}.{secrets.token_hex(4)}.part"
        part.mkdir()
        try:
            for name, arrays in state.parts():
                save(part / f"{name}.safetensors", self._options, arrays)
            return self._complete(part, state.step, state.facts)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise

    def begin_sharded(self, step: int) -> None:
        """Make room for a sharded checkpoint; in the first host, before the others write."""
        self._remove_parts()
        self.sharded_part(step).parent.mkdir()

    def sharded_part(self, step: int) -> Path:
        """Return the folder, not made as yet, that all hosts write a sharded checkpoint into."""
        return self._folder / f".{self.path(step).name}.sharded.part" / SHARDED

    def complete_sharded(self, step: int, facts: Mapping[str, Any]) -> Path:
        """Put a sharded checkpoint in its place, when all hosts have written; in the first host."""
        return self._complete(self.sharded_part(step).parent, step, facts)

    def sharded(self, step: int) -> Path | None:
        """Return the folder in a framework's own form; None of a portable checkpoint."""
        folder = self.path(step) / SHARDED
        return folder if folder.is_dir() else None

    def facts(self, step: int) -> dict[str, Any]:
        """Return the facts of a checkpoint; raise FormatError as :meth:`load`."""
        return self._read_facts(self.path(step) / FACTS, step)

    def load(self, step: int | None = None) -> State:
        """Read a checkpoint, of the newest step if None.

        Raises
        ------
        FormatError
            If there is none, it is truncated, sharded, of a later version, or of another recipe;
            the message names the file and the way out. One whose arrays have another dtype is
            refused also where changes are allowed.
        ParameterError
            If its arrays are not those of the recipe's model, in its dtype.
        """
        if step is None:
            steps = self.steps()
            if not steps:
                raise FormatError(f"{self._folder}: there is no checkpoint")
            step = steps[-1]
        path = self.path(step)
        facts = self.facts(step)
        if self.sharded(step):
            raise FormatError(f"{path}: {sharded_way_out(path)}")
        names = ["parameters", "momentum", *(["ema"] if self._recipe.ema else [])]
        arrays = {}
        for name in names:
            file = path / f"{name}.safetensors"
            try:
                arrays[name] = load(file)[1]
            except (OSError, FormatError) as error:
                raise FormatError(f"{error}; {self._way_out(step)}") from None
        state = State(step=step, facts=facts, **arrays)
        self._check(state, str(path))
        return state

    def _remove_parts(self) -> None:
        """Remove what processes that were killed have left, and what was replaced."""
        for left in self._folder.glob(".step-*.part"):
            shutil.rmtree(left)

    def _complete(self, part: Path, step: int, facts: Mapping[str, Any]) -> Path:
        """Write what is worth knowing, rename to the final name, and remove what is too old."""
        data = {
            "schema": SCHEMA,
            "step": step,
            "recipe_id": self._recipe.id,
            "recipe": self._recipe.to_dict(),
            "facts": dict(facts),
        }
        write_text(part / FACTS, json.dumps(data, allow_nan=False) + "\n")
        _sync(part)
        final = self.path(step)
        if final.exists():
            # A training that went on from an older step comes by again.
            final.rename(self._folder / f".{final.name}.{secrets.token_hex(4)}.old.part")
        part.rename(final)
        _sync(self._folder)
        self._remove_parts()
        for other in self.steps()[: -self._recipe.checkpoint.keep]:
            if other != step:
                shutil.rmtree(self.path(other))
        return final

    def _read_facts(self, file: Path, step: int) -> dict[str, Any]:
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            schema, recipe_id, facts = data["schema"], data["recipe_id"], dict(data["facts"])
            compute = data["recipe"]["precision"]["compute"]
            if data["step"] != step:
                raise FormatError(f"it says step {data['step']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(
                f"{file}: cannot be read as a checkpoint's state: {error}; {self._way_out(step)}"
            ) from None
        if schema != SCHEMA:
            raise FormatError(f"{file}: version {schema}, and this release reads {SCHEMA}")
        mine = self._recipe.precision.compute
        if (compute == "float64") != (mine == "float64"):
            raise FormatError(
                f'{file}: the checkpoint is of precision.compute="{compute}", and the recipe of '
                f'"{mine}", but no array changes its dtype on the way; choose another folder, or '
                'begin from these weights (model.init="file", --init)'
            )
        if recipe_id != self._recipe.id and not self._allow_changed:
            raise FormatError(
                f"{file}: the checkpoint is of the recipe {recipe_id[:12]}, not of "
                f"{self._recipe.id[:12]}; choose another folder, or allow the change "
                "(--allow-changed)"
            )
        return facts

    def _way_out(self, step: int) -> str:
        older = [other for other in self.steps() if other < step]
        if not older:
            return f"remove {self.path(step)} to begin anew"
        return f"remove {self.path(step)} to go on from step {older[-1]}"

    def _check(self, state: State, where: str) -> None:
        """Raise ParameterError unless the parts are the recipe's, fit its model, have its dtype."""
        if (state.ema is None) != (self._recipe.ema is None):
            has, wants = ("no", "one") if state.ema is None else ("an", "none")
            raise ParameterError(f"{where}: there is {has} average, and the recipe has {wants}")
        options = self._options
        specs = parameters(options.variant, options.num_classes, options.in_channels)
        for name, arrays in state.parts():
            try:
                check_arrays(specs, arrays)
            except ParameterError as error:
                raise ParameterError(f"{where}: {name}: {error}") from None
            dtype = self._recipe.precision.state
            other = {key: array.dtype for key, array in arrays.items() if array.dtype != dtype}
            if other:
                key = next(iter(other))
                raise ParameterError(
                    f"{where}: {name}: {key} is {other[key]}, and with precision.compute="
                    f'"{self._recipe.precision.compute}" it has to be {dtype}'
                )


def _sync(folder: Path) -> None:
    """Make what was written to a folder outlast a crash, where the system can."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
