"""Weights of NFNets in files, and between frameworks: the library behind ``agc convert``.

A file is in one of six *forms*. All hold the same numbers, and conversion keeps every bit. Files
of PyTorch and Keras themselves, and DeepMind's pickles, are read as well.

=========== =========== ======================================== ===================================
form        file        names                                    layout
=========== =========== ======================================== ===================================
``neutral`` safetensors canonical: ``stages.0.0.conv0.weight``   HWIO and IO, as in DeepMind's files
``torch``   safetensors canonical: ``model.state_dict()``        OIHW and OI
``flax``    safetensors canonical: paths of ``nnx.state(model)`` HWIO and IO
``keras``   safetensors ``stages.0/0/conv0/weight``: a           HWIO and IO
                        variable's path after the model's name
``timm``    safetensors ``stages.0.0.conv1.weight``: a state     OIHW, OI; gains ``(o, 1, 1, 1)``,
                        dict of ``dm_nfnet_f*``                  squeeze-and-excite ``(o, i, 1, 1)``
``haiku``   npz         ``NFNet/~/nf_block/~/conv0/w``           HWIO and IO
=========== =========== ======================================== ===================================

Metadata say which variant and options the weights belong to. This package imports NumPy only;
safetensors is needed to read such files (the extra ``weights``).
"""

from agc.weights.forms import FORMAT_VERSION, FORMS
from agc.weights.store import Weights, convert, load, open_weights, save

__all__ = ["FORMAT_VERSION", "FORMS", "Weights", "convert", "load", "open_weights", "save"]
