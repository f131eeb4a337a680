"""Every conformance vector, through the adapter's own backend."""

# What PyTorch has no layer for.
UNSUPPORTED = {
    "L0-plan-einsum:-",
    "L0-plan-hf-conv1d:-",
    "L0-plan-stacked-dense:-",
}


def test_all_vectors_pass(run_suite):
    found = run_suite("--no-train", "--no-models")
    assert len(found) >= 399
    assert {key for key, status in found.items() if status != "passed"} == UNSUPPORTED
