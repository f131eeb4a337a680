"""Every conformance vector, through the adapter's own backend."""

from tests.contract.suite import VectorsContract


class TestVectors(VectorsContract):
    # What Keras has no layer for, tensors in pieces, old gradients, and steps that Keras itself
    # refuses.
    unsupported = frozenset(
        {
            "L0-plan-grouped-conv-transpose2d:-",
            "L0-plan-bilinear:-",
            "L0-plan-hf-conv1d:-",
            "L0-plan-stacked-dense:-",
            "L3-idle-step:float32",
            "L3-sam-stale:float32",
            "L3-sharded:float32",
            "L3-sharded-nan:float32",
        }
    )
