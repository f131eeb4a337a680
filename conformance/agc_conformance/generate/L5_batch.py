"""Batches: the SHA-256 of all arrays, at the first steps, the border of an epoch and the last."""

from __future__ import annotations

from typing import Final

from agc_conformance.core.functions import Core
from agc_conformance.core.recipes import batch_digests
from agc_conformance.generate.build import vector
from agc_conformance.generate.parameters import Data

__all__ = ["TITLE", "VECTORS"]

TITLE: Final = "Batches: bits, on any number of hosts"

_ALL: Final = ["MixRatio", "CutMixBox", "PartialEpoch"]
_STEPS: Final = [0, 1, 6, 49]
"""The first two, the one with the border of the first epoch, and the last."""


def _batch(
    name: str,
    flags: list[str],
    comment: str,
    changes: str = "",
    *,
    hosts: int = 1,
    steps: list[int] = _STEPS,
) -> Data:
    body = {"toml": 'base = "conformance"\n' + changes, "hosts": hosts, "steps": steps}
    expect = {"sha256": batch_digests(Core(), body)}
    return vector(f"L5-batch-{name}", "RECIPE-2", "batch", flags, comment, **body, expect=expect)


VECTORS: Final = [
    _batch("one-host", _ALL, "Every augmentation, and masks of both kinds."),
    _batch("two-hosts", [*_ALL, "HostShuffle"], "Two blocks of each batch.", hosts=2, steps=[1, 6]),
    _batch(
        "four-hosts",
        [*_ALL, "HostShuffle"],
        "Four blocks of each batch.",
        "sam.group = 8\n",
        hosts=4,
        steps=[1, 6],
    ),
    _batch(
        "clean",
        _ALL,
        "RandAugment without DeepMind's quirks, before mixing; the crop of torchvision.",
        'augment.order = "augment-first"\ninput.crop.rule = "torchvision"\n'
        'augment.randaugment = { layers = 2, magnitude = 12, flavour = "clean" }\n',
        steps=[1, 6],
    ),
    _batch(
        "magnitude-15",
        _ALL,
        "The largest magnitude of the published recipes.",
        'augment.randaugment = { layers = 2, magnitude = 15, flavour = "deepmind" }\n',
        steps=[1, 6],
    ),
]
