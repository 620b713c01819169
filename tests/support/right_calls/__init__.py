"""A right call of every public name, and the kind of each of its arguments: the material of the fuzz test.

A table for each part of the package; kinds are those of ``bad_arguments``. They are written by hand, not read off the
signatures: what is checked must not be checked against itself.
"""

from right_calls import data, effects, interventions, model, scores, sparse
from right_calls.given import Call, Given

TABLES = (data, model, interventions, scores, effects, sparse)


def calls(given: Given) -> dict[str, Call]:
    """Every public name, called rightly; some of them twice, as methods or with a run."""
    return {name: call for table in TABLES for name, call in table.calls(given).items()}
