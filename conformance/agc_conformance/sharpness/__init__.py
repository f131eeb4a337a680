"""SAM: problems of weights and examples, what is asked of a backend, and how its answer is compared."""
