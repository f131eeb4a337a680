"""AGC: problems of gradients, what is asked of a backend, and how its answer is compared."""
