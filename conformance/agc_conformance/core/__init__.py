"""Level 0: configurations, units and plans, which the core of this library makes."""
