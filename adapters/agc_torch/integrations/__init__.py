"""AGC and SAM in trainers, one module for each; each needs its trainer's package.

``transformers`` and ``lightning`` have callbacks, ``timm`` an AGC that knows the classifier.
Accelerate needs none: :func:`agc_torch.attach` takes what ``prepare`` returns.
"""
