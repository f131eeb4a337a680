"""AGC, SAM and NFNets in JAX, as the suite asks for them: a module a question."""
