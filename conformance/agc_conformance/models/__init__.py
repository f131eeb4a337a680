"""Level 4: NFNets, forward and backward, their plans and their training, compared with float64 NumPy."""
