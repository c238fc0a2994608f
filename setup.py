"""Folders of the packages; everything else stands in pyproject.toml.

`conf/` lies at the top of the repository and is installed as `lq_plugin.conf`, so that Hydra finds it
as `pkg://lq_plugin.conf` from a wheel and from an editable install alike. setuptools cannot say in
pyproject.toml both "find the packages" and "and this folder under another name".

The package index shows the README far from the files that it links to: its links become addresses in the repository.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

HERE = Path(__file__).parent


def described() -> str:
    """Returns README.md with absolute links."""
    (repository,) = re.findall(r'^Repository = "(.+)"$', (HERE / "pyproject.toml").read_text(encoding="utf-8"), re.M)

    def absolute(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        if "://" in target or target.startswith("#"):
            return link[0]
        return f"{picture}[{text}]({repository}/{'raw' if picture else 'blob'}/main/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", absolute, (HERE / "README.md").read_text(encoding="utf-8"))


setup(
    long_description=described(),
    long_description_content_type="text/markdown",
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
