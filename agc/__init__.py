"""AGC and SAM, specified once: configuration, units, plans and the float64 reference.

This package imports NumPy and no framework. The adapters ``agc_torch``, ``agc_jax`` and
``agc_tensorflow`` carry its plans out natively.
"""

from agc.config import AGC, SAM
from agc.errors import AGCError
from agc.plan import Plan, PlanEntry
from agc.schedule import Schedule
from agc.units import Units

__version__ = "0.1.0"

__all__ = ["AGC", "SAM", "AGCError", "Plan", "PlanEntry", "Schedule", "Units", "__version__"]
