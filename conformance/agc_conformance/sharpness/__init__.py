"""SAM in the suite: problems, comparison, wrong implementations."""
