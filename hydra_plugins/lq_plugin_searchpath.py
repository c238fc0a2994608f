"""Adds the config groups `lq`, `quantization` and `hparams_search` to every Hydra application.

Hydra imports this file whenever an application starts: nothing heavy may be imported here.
`hydra_plugins` is a namespace package shared with other projects and has no `__init__.py`.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class LQSearchPathPlugin(SearchPathPlugin):
    """Appends `pkg://lq_plugin.conf.shared` as the last place to look: the application's own configs win.

    The experiments, models and data of our own commands stay out of sight: an application may ask for all that it has
    of a group, as with `experiment=glob(*)`.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="lq_plugin", path="pkg://lq_plugin.conf.shared")
