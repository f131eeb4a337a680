"""AGC, SAM and NFNets in TensorFlow, as the suite asks for them: one module for each subject."""

import agc_tensorflow  # noqa: F401 - first, since it says which package is missing, and the way out
