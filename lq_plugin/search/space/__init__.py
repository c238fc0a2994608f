"""Search spaces: the choices of every tensor, as Optuna parameters and as plans."""

from typing import TYPE_CHECKING

from lq_plugin.utilities.lazy import attributes

if TYPE_CHECKING:
    from lq_plugin.search.space.space import Space as Space, SpaceRule as SpaceRule, parse_choices as parse_choices

__getattr__, __dir__, __all__ = attributes(__name__, __file__)
