"""Flags: the bug classes that vectors catch.

Each was seen in published code, or is one edit away from it.
"""

from __future__ import annotations

from typing import Final

__all__ = ["FLAGS"]

FLAGS: Final[dict[str, str]] = {
    # Which axis is a unit
    "WrongAxisDense": "dense weights are reduced over the wrong axis (a JAX axis copied to PyTorch)",
    "WrongAxisConv": "convolutions are reduced over the wrong axes, rank 3 taken for a stack of matrices",
    "WrongAxisConvTranspose": "a transposed convolution is read as if it were an ordinary one",
    "WrongAxisDepthwise": "a depthwise kernel stored channels-first-of-last is mixed over channels",
    "WrongAxisAttention": "heads are reduced, or kept, where the einsum says otherwise",
    "WrongAxisEmbedding": "embedding columns are units instead of rows",
    "WrongAxisStacked": "norms run across stacked layers or experts",
    "GroupedSplit": "the groups of a fused axis are not taken apart",
    "Squeeze": "axes of size 1 are squeezed away, so Dense(1 -> C) becomes one vector",
    "RankLimit": "ranks above 4 raise, or are reduced over the wrong axes",
    "VectorPerElement": "a vector of rank above 1 (class token, layer scale, head bias) is clipped per element",
    "VectorRefused": "a vector of rank above 1 raises, or follows the framework's layout",
    "UnitsGuessed": "units are guessed where nothing settles them",
    "PerTensor": "one norm for the whole parameter where every unit has its own",
    "TensorGranularity": "granularity='tensor' still clips unit by unit",
    "GlobalNorm": "one norm for all parameters, or clipping by global norm",
    # The threshold
    "MissingEps": "no floor of the weight norm: zero weights freeze",
    "AdditiveEps": "eps is added to the weight norm instead of being its floor",
    "EpsInsideRoot": "eps is added under the square root",
    "SecondEps": "a second epsilon in the division (1e-6), wrong for small thresholds",
    "TieClipped": "a norm equal to the limit is clipped (0/0 where both are zero)",
    "UnclippedChanged": "an unclipped unit does not keep its bits",
    "WrongNorm": "another norm than L2, or the mean square",
    "IgnoresClipping": "the threshold per parameter or None is ignored",
    "IgnoresSchedule": "the schedule is ignored, or read at another step",
    # Precision
    "NormInInputDtype": "squares or sums in float16 or bfloat16: overflow and underflow",
    "LowPrecisionScale": "norms, limits or scales are rounded to the gradient's dtype before use",
    "NaiveAccumulation": "a long sum in float32 loses more than the limit",
    "DtypePromoted": "the result has another dtype than the gradient",
    "ComplexSquare": "complex numbers are squared, not multiplied by their conjugates",
    # Non-finite values
    "NaNPasses": "a unit poisoned by NaN passes unclipped",
    "InfToZero": "an infinity makes the rest of its unit zero",
    "PoisonSpreads": "a poisoned unit damages units or parameters beside it",
    "PolicyIgnored": "the non-finite policy is not the one asked for",
    "OverflowToZero": "finite gradients whose squares overflow become exact zeros",
    # Selection
    "EmptyOrScalar": "empty or 0-dimensional parameters break",
    "NoneGradient": "a parameter without a gradient breaks, or is made up",
    "IdleStep": "a step in which no parameter has a gradient breaks",
    "ExcludeIgnored": "an exclusion pattern is not obeyed",
    "ExcludeByOrder": "the head is guessed from the order of parameters",
    "ExcludeHeadBias": "'@head.weight' also excludes the head's bias, or '@head' does not",
    "UnverifiedPattern": "a pattern that matches nothing is silently accepted",
    "SparseDensified": "a row-sparse gradient is made dense, or rows without gradient are touched",
    "SparseDuplicates": "a row that appears twice is not summed before it is clipped",
    # Order and place
    "DecayBeforeClip": "weight decay is clipped together with the gradient",
    "DecayBeforeNorm": "norms are taken of weights already decayed",
    "StaleWeights": "norms are taken of another step's weights",
    "ClipAfterMomentum": "the momentum buffer is clipped instead of the gradient",
    "ClipEachMicroBatch": "every micro-batch is clipped instead of their mean",
    "ClipBeforeUnscale": "scaled gradients are clipped",
    "PerShardNorm": "every shard has its own norm",
    "Compiled": "the compiled step differs from the eager one",
    "ThroughOptimizer": "the wrapped optimizer does not clip, or clips twice",
    # Reports and errors
    "WrongStats": "telemetry miscounts",
    "AcceptsBadInput": "a shape, dtype or gradient that the specification refuses is accepted",
    "AcceptsBadConfig": "a hyper-parameter outside the specification is accepted",
    "RoundTrip": "a configuration changes when written to a dict and read back",
    "WrongDefault": "a default differs from the specification",
    "PatternParser": "a units pattern is read wrongly",
    "LayerPlan": "a framework's own layer is given the wrong units",
    # SAM: the perturbation
    "PerLayerNorm": "every layer is perturbed by its own norm",
    "AscentSign": "the perturbation points downhill",
    "RhoMisused": "rho is left out, squared, or divided by another norm",
    "NotNormalised": "the gradient is not divided by its norm",
    "PerturbationEps": "an epsilon beside the norm shrinks the radius of small gradients",
    "ProfileEps": "the epsilon of a profile is left out",
    "PerturbationOverflow": "squares of the ascent gradient overflow or underflow float32",
    "PerturbationNormDtype": "the ascent norm is taken in float16: infinite or zero, SAM is off",
    "ZeroGradientNaN": "a zero ascent gradient is divided by its norm",
    "StaleGradient": "the optimizer receives the first gradient, so SAM does nothing",
    # SAM: restoring
    "RestoreBySubtraction": "the weights are restored by subtracting the perturbation",
    "NotRestored": "the perturbation stays in the weights",
    "UnusedParameter": "a parameter without a gradient breaks, moves, or is made up",
    "GradientsLeft": "gradients that an earlier step left are added to those of a pass",
    "FixedPerturbed": "frozen parameters, or those of another optimizer, are perturbed",
    "StatePerPass": "what the forward pass keeps differs between the passes, or is not updated once",
    "NonFiniteAscent": "the policy for a non-finite ascent norm is not the one asked for",
    # SAM: the batch
    "SubsetIgnored": "the ascent pass sees the whole batch",
    "SubsetFromEnd": "the ascent pass sees another part of the batch than its beginning",
    "SubsetFloor": "the number of ascent examples is rounded down",
    "SubsetOfOtherBatch": "the ascent pass sees another batch",
    "DescentOnSubset": "the descent pass sees the ascent examples only",
    "MicrobatchSum": "gradients of micro-batches are summed, not averaged",
    "MicrobatchUnweighted": "uneven micro-batches count alike",
    "MicrobatchShared": "all micro-batches share one perturbation",
    "ScopeIgnored": "the scope of the ascent gradient is not the one asked for",
    "WrongLoss": "another loss than the clean one is reported",
    # SAM: variants and selection
    "AsamBias": "ASAM scales vectors too",
    "AsamEta": "ASAM without eta",
    "AsamSquare": "ASAM with T where T squared belongs",
    "AsamNorm": "ASAM divides by the norm of the unscaled gradient",
    "ExcludedInNorm": "what is not perturbed is in the norm",
    "ExcludedPerturbed": "what is excluded is perturbed",
    "EveryOffByOne": "other steps perturb than every k-th from 0",
    "RhoScheduleStep": "the schedule of rho is ignored, or read at another step",
    # SAM: order and place
    "AgcOnAscent": "the ascent gradient is clipped too",
    "AgcAgainstPerturbedWeights": "AGC measures the weights while they are perturbed",
    "DecayInGradient": "weight decay is in the ascent gradient, or of the perturbed weights",
    "RestartForgets": "a checkpoint forgets the counter or the optimizer's state",
    "SamCompiled": "the compiled step differs from the eager one",
    "SamLossScale": "a loss scale stays in the gradient or changes the perturbation",
    # SAM: errors
    "SamAcceptsBadInput": "SAM without a gradient or with empty micro-batches is accepted",
    "SamAcceptsBadConfig": "a hyper-parameter of SAM outside the specification is accepted",
    "SamUnverifiedPattern": "a pattern of only or exclude that matches nothing is accepted",
    "SamSelection": "only and exclude select other parameters",
    "SamRoundTrip": "a configuration of SAM changes when written to a dict and read back",
    "SamDefault": "a default or profile of SAM differs from the specification",
    # Recipes
    "RecipeLenient": "a recipe with an unknown key or a forbidden value is accepted",
    "RecipeId": "the id depends on what computes nothing, or misses what does",
    "RateStep": "the rate is that of another step",
    "WarmupRounded": "the warm-up is a whole number of steps",
    "EmaWarmup": "the decay of the average is the same at every step",
    "HostShuffle": "every host shuffles by itself",
    "PartialEpoch": "what is left of an epoch is dropped where a batch does not end with it",
    "MixRatio": "the ratio weighs the other image",
    "CutMixBox": "the box is taken from the other image",
}
"""Flag to a description of the bug."""
