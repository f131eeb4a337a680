"""Every conformance vector, through the adapter's own backend."""

from tests.contract.suite import VectorsContract


class TestVectors(VectorsContract):
    # What JAX has no layer for, and gradients that it does not have: sparse, None, and old ones.
    unsupported = frozenset(
        {
            "L0-plan-grouped-conv-transpose2d:-",
            "L0-plan-bilinear:-",
            "L0-plan-hf-conv1d:-",
            "L1-sam-no-gradient:float32",
            "L1-sparse-rows:float32",
            "L1-sparse-duplicates:float32",
            "L1-sparse-unclipped:float32",
            "L1-sparse-whole:float32",
            "L1-sparse-nan:float32",
            "L1-sparse-beside-dense:float32",
            "L1-sparse-columns:float32",
            "L3-sam-stale:float32",
        }
    )
