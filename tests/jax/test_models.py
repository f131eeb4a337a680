"""NFNets, through the adapter's own backend."""

from __future__ import annotations

import pytest

from tests.contract.suite import ModelsContract


class TestModels(ModelsContract):
    @pytest.fixture(autouse=True)
    def _compile_fast(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Instead of fast code, which takes most of the time; the main job asks for that."""
        monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
