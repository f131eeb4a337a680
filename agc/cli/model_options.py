"""Options that say which NFNet a file of weights belongs to, shared by commands."""

from __future__ import annotations

import argparse

from agc.nfnet import VARIANTS, WS_EPS, Options

__all__ = ["add_model_options", "describe"]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--variant``, ``--activation`` and ``--ws-eps``."""
    parser.add_argument("--variant", help=f"what it must be: {', '.join(VARIANTS)}")
    parser.add_argument("--activation", help="instead of what the file says; timm's is gelu_erf")
    parser.add_argument("--ws-eps", choices=list(WS_EPS), help="instead of what the file says")


def describe(options: Options) -> str:
    """Name a model in a few words."""
    return f"NFNet-{options.variant.name}, {options.num_classes} classes"
