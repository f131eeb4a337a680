"""Options that say which NFNet a file of weights belongs to, shared by commands."""

from __future__ import annotations

import argparse

from agc.nfnet import VARIANTS, WS_EPS, Options

__all__ = ["add_model_options", "add_which_option", "describe"]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--key``, ``--variant``, ``--activation`` and ``--ws-eps``."""
    parser.add_argument(
        "--key",
        metavar="NAME",
        help="where in the file they are, if it holds several weights: state_dict, ema.model",
    )
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help=f"what it must be (what fits best): {', '.join(VARIANTS)}",
    )
    parser.add_argument(
        "--activation",
        metavar="NAME",
        help="instead of what the file says (gelu if it says nothing); timm's is gelu_erf",
    )
    parser.add_argument(
        "--ws-eps",
        choices=list(WS_EPS),
        help="epsilon of the weights' variance, instead of what the file says (deepmind if it says nothing)",
    )


def add_which_option(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the option that says which of raw and averaged weights are meant."""
    parser.add_argument(
        name,
        dest="which",
        choices=["raw", "ema"],
        help="which weights, if there are raw and averaged ones "
        "(of a folder of agc train, those that its recipe evaluates)",
    )


def describe(options: Options) -> str:
    """Name a model in a few words."""
    prefix = "NFNet-" if options.variant.family == "NFNet" else ""
    return f"{prefix}{options.variant.name}, {options.num_classes} classes"
