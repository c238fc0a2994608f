from tests.cifar_data import data_folder  # noqa: F401  (a fixture)
