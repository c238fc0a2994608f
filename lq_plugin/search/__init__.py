"""Search the bits of a model: a space, an evaluator that calibrates once, a study, and what it found."""

from lq_plugin.search.bound import BoundSpace, Unit
from lq_plugin.search.costs import COSTS
from lq_plugin.search.database import StudyError
from lq_plugin.search.dominance import DominancePruner
from lq_plugin.search.evaluator import Evaluation, Evaluator
from lq_plugin.search.job import current_trial
from lq_plugin.search.levels import Level, evaluate_at
from lq_plugin.search.objective import Objective
from lq_plugin.search.result import Candidate, SearchResult
from lq_plugin.search.space import Space, SpaceRule, parse_choices
from lq_plugin.search.study import search, tpe
from lq_plugin.search.trial_report import TrialReport

__all__ = [
    "COSTS",
    "BoundSpace",
    "Candidate",
    "DominancePruner",
    "Evaluation",
    "Evaluator",
    "Level",
    "Objective",
    "SearchResult",
    "Space",
    "SpaceRule",
    "StudyError",
    "TrialReport",
    "Unit",
    "current_trial",
    "evaluate_at",
    "parse_choices",
    "search",
    "tpe",
]
