"""AGC, SAM and NFNets in PyTorch, as the suite asks for them: a module a question."""
