"""Where labelled images come from: anything with ``__len__`` and ``__getitem__``.

A *row* is a pair (image, label), or a mapping with the keys ``"image"`` and ``"label"`` as Hugging
Face's data sets have. An image is a uint8 array, shape (height, width) or (height, width, 1 or 3),
or an image of Pillow; a label is an integer from 0 on. A row must be the same whenever it is asked
for, and safe to ask for from several threads.
"""

from agc.data.sources.choose import PARTS, open_source
from agc.data.sources.rows import Source, read_row
from agc.data.sources.synthetic import Synthetic

__all__ = ["PARTS", "Source", "Synthetic", "open_source", "read_row"]
