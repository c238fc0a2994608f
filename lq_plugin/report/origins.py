"""Origins of the plans of trials, in the words that legends, captions and tables share."""

from __future__ import annotations

#: Kinds of trials, and what a legend calls each.
KINDS = {
    "sampled": "sampled",
    "uniform": "uniform bits",
    "sensitivity": "from sensitivity",
    "refined": "fills a gap of the front",
}


def kind_of(origin: str) -> str:
    """Returns the kind of a trial: one of `KINDS`, `sampled` for the words of a sampler.

    >>> [kind_of(origin) for origin in ("ilp 3.5", "greedy 3.5", "uniform 4 bits", "refined", "sampled")]
    ['sensitivity', 'sensitivity', 'uniform', 'refined', 'sampled']
    """
    first = origin.partition(" ")[0]
    if first in ("ilp", "greedy"):
        return "sensitivity"
    return first if first in KINDS else "sampled"


def told(origin: str) -> str:
    """Returns an origin in words.

    >>> told("ilp 3.5"), told("greedy 3.5"), told("refined")
    ('from sensitivity, for 3.5', 'from sensitivity step by step, for 3.5', 'fills a gap of the front')
    >>> told("uniform 4 bits"), told("sampled")
    ('uniform 4 bits', 'sampled')
    """
    first, _, rest = origin.partition(" ")
    if first == "ilp":
        return f"from sensitivity, for {rest}"
    if first == "greedy":
        return f"from sensitivity step by step, for {rest}"
    return KINDS["refined"] if origin == "refined" else origin
