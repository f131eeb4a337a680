"""Every conformance vector, through the adapter's own backend."""

from tests.contract.suite import VectorsContract


class TestVectors(VectorsContract):
    # What PyTorch has no layer for.
    unsupported = frozenset(
        {
            "L0-plan-einsum:-",
            "L0-plan-hf-conv1d:-",
            "L0-plan-stacked-dense:-",
        }
    )
