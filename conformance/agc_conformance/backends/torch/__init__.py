"""AGC, SAM and NFNets in PyTorch, as the suite asks for them: one module for each subject."""

import agc_torch  # noqa: F401 - first, since it says which package is missing, and the way out
