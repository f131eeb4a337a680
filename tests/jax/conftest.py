"""Set-up of JAX for tests: eight CPU devices, so that arrays can be sharded."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what may be compiled fast."""
    for item in items:
        if "quick" in getattr(item, "fixturenames", ()):
            item.add_marker("quick")


@pytest.fixture(scope="module")
def quick(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compile fast instead of fast code; not for tests that count units in the last place.

    JAX may take a program that it has for one that it is asked for, so none is left to modules that
    want fast code.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    if any("quick" not in item.keywords for item in request.session.items):
        jax.clear_caches()


@pytest.fixture(scope="module")
def x64() -> Iterator[None]:
    """Allow float64; arrays of other dtypes keep theirs."""
    with jax.enable_x64(True):
        yield
