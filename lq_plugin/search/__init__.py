"""Searches of bit-widths, granularities and clipping, layer by layer, with Optuna."""

from typing import TYPE_CHECKING

from lq_plugin.utilities.lazy import attributes

if TYPE_CHECKING:
    from lq_plugin.search.evaluation.costs import COSTS as COSTS
    from lq_plugin.search.evaluation.evaluator import Evaluation as Evaluation, Evaluator as Evaluator
    from lq_plugin.search.evaluation.rungs import Rung as Rung, evaluate_at as evaluate_at
    from lq_plugin.search.shared.database import StudyError as StudyError
    from lq_plugin.search.shared.dominance import DominancePruner as DominancePruner
    from lq_plugin.search.space.model_space import ModelSpace as ModelSpace, Unit as Unit
    from lq_plugin.search.space.space import Space as Space, SpaceRule as SpaceRule, parse_choices as parse_choices
    from lq_plugin.search.study.candidates import Candidate as Candidate
    from lq_plugin.search.study.confidence import Confirm as Confirm, Interval as Interval
    from lq_plugin.search.study.config import SearchConfig as SearchConfig, tpe as tpe
    from lq_plugin.search.study.objective import Objective as Objective
    from lq_plugin.search.study.report import study_report as study_report
    from lq_plugin.search.study.result import SearchResult as SearchResult
    from lq_plugin.search.study.search import search as search
    from lq_plugin.search.study.study_logs import StudyLogs as StudyLogs
    from lq_plugin.search.surrogate.problem import Problem as Problem
    from lq_plugin.search.surrogate.sampler import SurrogateSampler as SurrogateSampler
    from lq_plugin.search.sweep.job import current_trial as current_trial
    from lq_plugin.search.sweep.trial_report import TrialReport as TrialReport

__getattr__, __dir__, __all__ = attributes(__name__, __file__)
