"""Adds the configs of lq_plugin to every Hydra application, so that `+lq=qat` is found.

Hydra imports this file whenever an application starts: nothing heavy may be imported here.
`hydra_plugins` is a namespace package shared with other projects and has no `__init__.py`.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

CONFIG_PACKAGE = "pkg://lq_plugin.conf"


class LQSearchPathPlugin(SearchPathPlugin):
    """Appends `pkg://lq_plugin.conf` as the last place to look: the application's own configs win."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        # It is there already where lq_plugin is the application itself (lq-train, lq-search).
        if all(entry.path != CONFIG_PACKAGE for entry in search_path.get_path()):
            search_path.append(provider="lq_plugin", path=CONFIG_PACKAGE)
