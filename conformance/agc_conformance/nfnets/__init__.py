"""NFNets: the questions for a backend, the float64 reference, and numbers of DeepMind's code."""
