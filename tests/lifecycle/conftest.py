from tests.callbacks.conftest import data, module, trainer  # noqa: F401  (fixtures)
