"""Batches of training recipes: NumPy alone, the same bits in every framework.

What random numbers are made of is in ``uniforms``; ``order``, ``crop``, ``resize``, ``mix``,
``operations`` with ``randaugment``, and ``masks`` each do one thing with them; ``examples`` puts
these together for one example, ``batches`` and ``evaluation`` for a step. Images come from
``sources``; ``initial`` draws a model's first values.

The rules, each with a test:

* DATA-1: example ``i`` of step ``t`` has the number ``n = t * batch + i``; a host makes a block.
* DATA-2: example ``n`` is made from the source images ``2n`` and ``2n + 1`` if examples are mixed,
  else from ``n``; source image ``k`` belongs to epoch ``k // images``, whose order is a stable sort
  of uniform numbers. There is no shuffle buffer.
* DATA-3: random numbers follow from seed, purpose and the item's number, by Philox's raw bits.
* DATA-4: what comes out of ``pow`` and ``exp`` is rounded to a grid before it is used.
* DATA-5: which examples are mixed in which way follows from their number.
* DATA-6: images are uint8 after RandAugment; else normalised here.
* DATA-7: an evaluation has every image once; what fills up the last batch has weight 0.
* DATA-8: masks of stochastic depth and dropout are part of the batch.
"""

from agc.data.batches import Batch, Batches
from agc.data.digest import digest
from agc.data.evaluation import Evaluation, EvaluationBatch
from agc.data.feed import feed
from agc.data.initial import initial_values
from agc.data.sources import PARTS, Source, open_source
from agc.data.targets import normalisation_table, soft_labels
from agc.nfnet.images import normalise

__all__ = [
    "PARTS",
    "Batch",
    "Batches",
    "Evaluation",
    "EvaluationBatch",
    "Source",
    "digest",
    "feed",
    "initial_values",
    "normalisation_table",
    "normalise",
    "open_source",
    "soft_labels",
]
