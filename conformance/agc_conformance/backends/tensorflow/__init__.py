"""AGC, SAM and NFNets in TensorFlow, as the suite asks for them: one module for each subject."""
