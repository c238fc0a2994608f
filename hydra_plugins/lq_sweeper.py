"""`hydra/sweeper=lq`: Optuna proposes, and each trial is one Hydra job of an existing project.

Hydra imports this file whenever an application starts: nothing heavy may be imported here. The work is done in
`lq_plugin.search.sweep.sweep`. `hydra_plugins` is a namespace package shared with other projects and has no
`__init__.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class LQSweeperConf:
    """The fields of `lq_plugin.search.sweep.settings.SweepSettings`, which explains them."""

    _target_: str = "hydra_plugins.lq_sweeper.LQSweeper"
    # Hydra 1.3 would build sampler and pruner; 1.4 does not. So they are built in one place for both.
    _recursive_: bool = False

    study_name: str = "lq_sweep"
    storage: Any = None
    direction: Any = "minimize"
    n_trials: int = 20
    n_jobs: int = 1
    seed: int = 0
    sampler: Any = None
    pruner: Any = None
    params: dict[str, Any] = field(default_factory=dict)
    layers: Any = None
    plan_key: Any = None
    uniform: bool = True
    enqueue: list[Any] = field(default_factory=list)
    costs: list[str] = field(default_factory=list)
    constraints: list[str] = field(default_factory=list)
    retries: int = 0
    max_failures: int = 10
    heartbeat: int = 10


ConfigStore.instance().store(group="hydra/sweeper", name="lq", node=LQSweeperConf, provider="lq_plugin")


class LQSweeper(Sweeper):
    """One Hydra job a trial, through any launcher. Its settings are read from `config.hydra.sweeper`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.hydra_context: HydraContext | None = None
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self._sweep: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        # Optuna and torch cost seconds: they are loaded for a sweep only.
        from hydra.core.plugins import Plugins

        from lq_plugin.search.sweep.job import TrialJob
        from lq_plugin.search.sweep.settings import SweepSettings

        self.hydra_context, self.config = hydra_context, config
        self._settings = SweepSettings.from_config(config)
        job = TrialJob.wrapping(task_function, self._settings.study_access)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=job, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from lq_plugin.search.sweep.sweep import sweep

        assert self.hydra_context is not None
        assert self.config is not None
        return sweep(
            self._settings,
            arguments,
            self.config,
            self.hydra_context.config_loader,
            self._launch,
            self.validate_batch_is_legal,
        )

    def _launch(self, overrides: Sequence[Sequence[str]], first: int) -> None:
        assert self.launcher is not None
        self.launcher.launch(overrides, initial_job_idx=first)
