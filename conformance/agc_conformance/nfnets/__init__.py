"""NFNets: what is asked of a backend, the float64 answer, and numbers that are known for certain."""
