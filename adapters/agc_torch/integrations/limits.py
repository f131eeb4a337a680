"""Which limit of the global norm holds: the integration's or the trainer's."""

from __future__ import annotations

from agc.errors import ConfigError

__all__ = ["global_norm"]


def global_norm(max_norm: float | None, name: str, trainers: float | None) -> float | None:
    """Return the limit that comes after AGC (AGC-7).

    Parameters
    ----------
    max_norm : float, optional
        What the integration was given.
    name : str
        The trainer's own setting.
    trainers : float, optional
        Its value; 0 is none.

    Raises
    ------
    ConfigError
        If both are given.
    """
    if max_norm is not None and trainers:
        raise ConfigError(
            f"max_norm={max_norm} and the trainer's {name}={trainers} both limit the global norm, and the "
            f"trainer would do so before AGC; give one of them, and {name} moves behind AGC"
        )
    return max_norm if max_norm is not None else (trainers or None)
