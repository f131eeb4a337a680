"""A recipe: all tables together, what must hold between them, and the recipe's id."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Final

from agc.checks import check_count
from agc.config import AGC, SAM, FrozenMap
from agc.errors import AGCError, ConfigError
from agc.nfnet import VARIANTS, Options
from agc.recipe.keys import check_keys, check_tables, dotted, fields_of, tables_of
from agc.recipe.tables import (
    Augment,
    Checkpoint,
    Data,
    Ema,
    Evaluate,
    Input,
    Model,
    Optimizer,
    Precision,
    RateSchedule,
    Sharpness,
    Train,
    Weights,
)

__all__ = ["SCHEMA", "Recipe"]

SCHEMA: Final = 1
"""Version of the file format."""

_SEEDS: Final = 2**63


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a training computes, and nothing that decides where.

    Attributes
    ----------
    seed : int
        Of initial values, order of the images, augmentation and masks; from 0 to 2^63 - 1.
    model, data, input, augment, train, optimizer, schedule, precision, evaluate, checkpoint
        See the classes.
    agc : AGC, optional
        Absent is training without clipping.
    sam : Sharpness, optional
        Absent is training without sharpness-aware minimization.
    ema : Ema, optional
        Absent is no average of the weights.
    notes : mapping of str to str
        Dotted key to a remark, such as that a value is not published. No part of the id.
    schema : int
        Version of the file format.

    Raises
    ------
    ConfigError
        If a value is not allowed, or two do not fit; the message names the keys.
    """

    schema: int = SCHEMA
    seed: int = 0
    model: Model
    data: Data
    input: Input = field(default_factory=Input)
    augment: Augment = field(default_factory=Augment)
    train: Train
    optimizer: Optimizer
    schedule: RateSchedule = field(default_factory=RateSchedule)
    agc: AGC | None = None
    sam: Sharpness | None = None
    ema: Ema | None = None
    precision: Precision = field(default_factory=Precision)
    evaluate: Evaluate = field(default_factory=Evaluate)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    notes: Mapping[str, str] = field(default_factory=FrozenMap, compare=False)

    def __post_init__(self) -> None:
        if type(self.schema) is not int or self.schema != SCHEMA:
            raise ConfigError(f"schema must be {SCHEMA} for this release, got {self.schema!r}")
        object.__setattr__(self, "seed", check_count("seed", self.seed, 0))
        if self.seed >= _SEEDS:
            raise ConfigError(f"seed must be less than 2^63, got {self.seed}")
        if not isinstance(self.notes, Mapping):
            raise ConfigError(f"notes must be a table, got {self.notes!r}")
        object.__setattr__(self, "notes", FrozenMap(self.notes))
        check_tables(self)
        self._fill()
        self._check()

    # --- what follows from the tables -------------------------------------------------------------

    @property
    def epoch(self) -> float:
        """Steps of an epoch, unrounded."""
        return self.data.train.images / self.train.batch

    @property
    def steps(self) -> int:
        """Steps of the training: epochs are rounded down."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.epochs is not None
        return math.floor(self.data.train.images * self.train.epochs / self.train.batch)

    @property
    def warmup(self) -> float:
        """Steps of the rate's warm-up, unrounded."""
        if self.schedule.warmup_steps is not None:
            return self.schedule.warmup_steps
        assert self.schedule.warmup_epochs is not None
        return self.schedule.warmup_epochs * self.data.train.images / self.train.batch

    @property
    def peak(self) -> float:
        """Peak of the learning rate."""
        return self.optimizer.rate.at(self.train.batch)

    def options(self) -> Options:
        """Return what the model that is trained is made from, precision included."""
        return replace(self.model.options(), ws_dtype=self.precision.standardise)

    def canonical(self) -> str:
        """Return the recipe as JSON: every default filled in, keys sorted, no notes."""
        data = self.to_dict()
        data.pop("notes", None)
        for name in ("clipping", "units"):
            # The order of patterns decides which one wins, so it must survive the sorting.
            if isinstance(data.get("agc", {}).get(name), dict):
                data["agc"][name] = [list(item) for item in data["agc"][name].items()]
        return json.dumps(
            data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )

    @property
    def id(self) -> str:
        """SHA-256 of :meth:`canonical`, in hexadecimal."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as TOML and JSON data, every default filled in; nothing is None."""
        data: dict[str, Any] = _to_data(self)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Build a recipe from the tables of a file; missing keys have their defaults.

        Raises
        ------
        ConfigError
            If a key is unknown or missing, or a value not allowed; the message names the key.
        """
        check_keys(cls, data)
        recipe: Recipe = _from_data(cls, data, "")
        return recipe

    # --- checks -----------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Replace None by what follows from other tables."""
        variant = VARIANTS[self.model.variant]
        for name in ("train_pixels", "test_pixels"):
            if getattr(self.input, name) is None:
                if variant.family == "NF-ResNet":
                    raise ConfigError(
                        f"input.{name} must be given: {variant.name} has no published one"
                    )
                filled = replace(self.input, **{name: getattr(variant, name)})
                object.__setattr__(self, "input", filled)
        if self.evaluate.weights is None:
            weights: tuple[Weights, ...] = ("raw", "ema") if self.ema else ("raw",)
            object.__setattr__(self, "evaluate", replace(self.evaluate, weights=weights))

    def _check(self) -> None:
        channels = self.model.in_channels
        for name in ("mean", "std"):
            values = getattr(self.input, name)
            if len(values) != channels:
                raise ConfigError(
                    f"input.{name} must have a number for each of model.in_channels={channels} "
                    f"channels, got {len(values)}"
                )
        if self.steps < 1:
            raise ConfigError(
                f"train: {self.train.epochs:g} epochs of {self.data.train.images} images are less "
                f"than one step of batch={self.train.batch}"
            )
        if self.warmup > self.steps:
            raise ConfigError(
                f"schedule: the warm-up of {self.warmup:g} steps is longer than the training of "
                f"{self.steps} steps"
            )
        if self.schedule.end > self.peak:
            raise ConfigError(f"schedule.end={self.schedule.end} is above the peak {self.peak:g}")
        if self.agc is not None:
            clipping = self.agc.clipping
            values = clipping.values() if isinstance(clipping, Mapping) else [clipping]
            if None in values:
                raise ConfigError(
                    "agc.clipping=None has no form in a file: leave the table [agc] out, or name "
                    "in agc.exclude what is not clipped"
                )
            self.agc.to_dict()  # raises for a callable that cannot be written
        if self.sam is not None:
            self.sam.rule.to_dict()
            self._check_group(self.sam)
        if self.ema is None and "ema" in (self.evaluate.weights or ()):
            raise ConfigError('evaluate.weights has "ema", but there is no table [ema]')
        if self.precision.standardise == "bfloat16" and self.precision.compute != "bfloat16":
            raise ConfigError('precision.standardise="bfloat16" needs precision.compute="bfloat16"')
        known = dict(dotted(self.to_dict()))
        for key, note in self.notes.items():
            if key not in known:
                raise ConfigError(f"notes: there is no key {key!r} in this recipe")
            if not isinstance(note, str) or not note.isprintable():
                raise ConfigError(f"notes: {key!r} must have one line of text, got {note!r}")

    def _check_group(self, sam: Sharpness) -> None:
        batch, group = self.train.batch, sam.group
        if group != "batch" and batch % int(group):
            raise ConfigError(f"sam.group={group} does not divide train.batch={batch}")
        examples = batch if group == "batch" else int(group)
        if sam.rule.fraction * examples < 1:
            raise ConfigError(
                f"sam.fraction={sam.rule.fraction} of {examples} examples is less than one"
            )


def _to_data(value: Any) -> Any:
    """Turn tables into dicts and sequences into lists; leave out what is None, and empty notes."""
    if isinstance(value, AGC | SAM):
        return _to_data(value.to_dict())
    if isinstance(value, Sharpness):
        data = _to_data(value.rule) | {"group": value.group}
        return {key: item for key, item in data.items() if key not in ("scope", "microbatches")}
    if is_dataclass(value):
        value = {item.name: getattr(value, item.name) for item in fields(value)}
        if not value.get("notes", True):
            del value["notes"]
    if isinstance(value, Mapping):
        return {key: _to_data(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_to_data(item) for item in value]
    return value


def _from_data(cls: Any, data: Mapping[str, Any], where: str) -> Any:
    """Build a table; ``where`` is its dotted name with a dot behind it, or empty."""
    values = dict(data)
    if cls not in (AGC, Sharpness):
        for name, nested in tables_of(cls).items():
            if name in values:
                values[name] = _from_data(nested, values[name], f"{where}{name}.")
    try:
        return _build(cls, values)
    except AGCError as error:
        first = re.match(r"\w*", str(error))
        of_field = not where or (first and first[0] in fields_of(cls))
        name = where if of_field else f"{where[:-1]}: "
        raise type(error)(f"{name}{error}") from None


def _build(cls: Any, values: dict[str, Any]) -> Any:
    if cls is AGC:
        return _profiled(AGC, values)
    if cls is Sharpness:
        group = {"group": values.pop("group")} if "group" in values else {}
        return Sharpness(rule=_profiled(SAM, values), **group)
    return cls(**values)


def _profiled(cls: Any, values: dict[str, Any]) -> Any:
    """Build AGC or SAM from a profile, if ``values`` names one, and changes to it, as data."""
    profile = values.pop("profile", None)
    base = {} if profile is None else cls.profile(profile).to_dict()
    return cls.from_dict({**base, **values})
