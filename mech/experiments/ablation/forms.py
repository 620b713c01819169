"""Pictures against text inside a study: the same scenes shown and written out, before and after a model was tuned.

    {key}/question      modality_transfer by RAM: what the rows of the question attend to
    {key}/answer        the same by the rows that write the answer, each on the evidence of its own token
    {key}/transfer      heads of pictures, of text, and of text before tuning, ablated on pictures and on text

Each is saved as soon as it is there. Answers are numbers of three digits, so that every digit has evidence of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import xarray as xr

from mech.arguments import Amount, NamedProgress
from mech.data.haystacks import haystacks
from mech.data.samples import Samples
from mech.experiments.ablation.transfer import transfer
from mech.experiments.ranking.ranking import rank_heads
from mech.experiments.scores.modality import modality_transfer
from mech.experiments.scores.published import Score
from mech.model import HookedMLLM
from mech.results import Study

ANSWER = Score("answer", on="parts")
ASKED: dict[str, str | Score] = {"question": "ram", "answer": ANSWER}
FORMS = ("pictures", "text")
FOUND_ON = {"pictures": "pictures", "text": "text", "text before tuning": "base text"}  # readings behind the rankings


@dataclass(frozen=True)
class Scenes:
    """What pictures and text are compared on.

    Attributes:
        domain: of the haystacks.
        n: scenes; one half finds heads, the other tests them.
        k: heads of each top set.
        n_random: random sets that are ablated beside.
        seed: of scenes and sets.
        batch_size: samples per forward.
    """

    domain: str
    n: int
    k: Amount
    n_random: int
    seed: int = 0
    batch_size: int = 16


def scenes(domain: str, n: int, seed: int) -> dict[str, Samples]:
    """The same scenes with numbers of three digits, shown and written out."""
    return {form: haystacks(domain, n, seed, answer="number", form=form) for form in FORMS}


def forms_in(
    results: Study,
    key: str,
    model: HookedMLLM,
    base: Callable[[], HookedMLLM],
    of: Scenes,
    say: NamedProgress,
) -> dict[str, xr.Dataset]:
    """What pictures and text share, and what the heads of each are worth for the other; computed or found.

    Args:
        results: the study.
        key: under which it is saved.
        model: a hooked model.
        base: opens the same before it was tuned.
        of: the scenes, and how many heads of them are compared.
        say: called with (what, done, in all).

    Cost: for each scene that finds heads eight forwards and a reference in both forms; for each that tests them, in
    both forms, ``4 + n_random`` forwards.
    """
    find, test = (scenes(of.domain, of.n // 2, seed) for seed in (of.seed, of.seed + 1))
    missing = [name for name in ASKED if not results.done(f"{key}/{name}")]
    before = base() if missing else None
    common: dict[str, Any] = dict(k=of.k, seed=of.seed, batch_size=of.batch_size)
    for name in missing:
        found = modality_transfer(
            model, find["pictures"], find["text"], before, score=ASKED[name],
            progress=lambda i, total, name=name: say(f"{key}: {name} rows", i, total), **common,
        )  # fmt: skip
        results.put(f"{key}/{name}", found)
    if not results.done(f"{key}/transfer"):
        by_answer = results.get(f"{key}/answer")["score"]
        rankings = {
            name: rank_heads(by_answer.sel(reading=reading), model=str(model.name), domain=of.domain)
            for name, reading in FOUND_ON.items()
        }
        found = transfer(
            model, find, test, rankings=rankings, n_random=of.n_random,
            progress=lambda i, total: say(f"{key}: transfer", i, total), **common,
        )  # fmt: skip
        results.put(f"{key}/transfer", found)
    return {name: results.get(f"{key}/{name}") for name in (*ASKED, "transfer")}
