"""Every conformance vector, through the adapter's own backend."""

# What Keras has no layer for, tensors in pieces, old gradients, and steps that Keras itself
# refuses.
UNSUPPORTED = {
    "L0-plan-grouped-conv-transpose2d:-",
    "L0-plan-bilinear:-",
    "L0-plan-hf-conv1d:-",
    "L0-plan-stacked-dense:-",
    "L3-idle-step:float32",
    "L3-sam-stale:float32",
    "L3-sharded:float32",
    "L3-sharded-nan:float32",
}


def test_all_vectors_pass(run_suite):
    found = run_suite("--no-train", "--no-models")
    assert len(found) >= 399
    assert {key for key, status in found.items() if status != "passed"} == UNSUPPORTED
