"""Which folders are which packages; everything else stands in pyproject.toml.

`conf/` lies at the top of the repository and is installed as `lq_plugin.conf`, so that Hydra finds it
as `pkg://lq_plugin.conf` from a wheel and from an editable install alike. setuptools cannot say in
pyproject.toml both "find the packages" and "and this folder under another name".
"""

from setuptools import find_namespace_packages, find_packages, setup

setup(
    packages=[
        *find_packages(include=["lq_plugin", "lq_plugin.*"]),
        *find_namespace_packages(include=["hydra_plugins", "hydra_plugins.*"]),
        "lq_plugin.conf",
        "lq_plugin.conf.shared",
    ],
    package_dir={"lq_plugin.conf": "conf", "lq_plugin.conf.shared": "conf/shared"},
    package_data={
        "lq_plugin": ["py.typed", "**/*.cpp", "**/*.h", "report/assets/*", "ptq/README.md"],
        "lq_plugin.conf": ["**/*.yaml"],
    },
)
