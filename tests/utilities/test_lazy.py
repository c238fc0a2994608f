"""Names of a package that are imported on first use."""

from importlib import import_module


def test_a_submodule_does_not_hide_the_function_of_its_name():
    module = import_module("lq_plugin.export.verify")
    from lq_plugin.export import verify

    assert verify is module.verify
