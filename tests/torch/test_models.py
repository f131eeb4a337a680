"""NFNets, through the adapter's own backend."""

from tests.contract.suite import ModelsContract


class TestModels(ModelsContract):
    pass
