"""AGC, SAM and NFNets in TensorFlow and Keras, as the suite asks for them: a module a question."""
