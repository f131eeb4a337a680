"""NFNets through the adapter's own backend: gradients and clipping; the suite's main job asks for
the rest.
"""


def test_gradients_and_clipping(run_suite):
    found = run_suite("--select", "NFNET-[24]")
    assert set(found.values()) == {"passed"}
    assert {key.rpartition(":")[2] for key in found} == {"float32", "float64", "bfloat16"}
    assert len(found) == 13
