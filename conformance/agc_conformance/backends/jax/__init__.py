"""AGC, SAM and NFNets in JAX, as the suite asks for them: one module for each subject."""
