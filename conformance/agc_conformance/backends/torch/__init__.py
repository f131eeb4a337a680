"""AGC, SAM and NFNets in PyTorch, as the suite asks for them: one module for each subject."""
