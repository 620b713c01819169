"""Pictures compared with text in a study: the same scenes shown and written out, before and after tuning a model.

    {key}/question      modality_transfer by RAM: what the question's rows attend to
    {key}/answer        the same for the rows that write the answer, each on the evidence of its own token
    {key}/transfer      heads found on pictures, on text, and on text before tuning, ablated on pictures and on text

Each is saved as soon as it is computed. Answers are three-digit numbers, so that every digit has its own evidence.
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
FOUND_ON = {"pictures": "pictures", "text": "text", "text before tuning": "base text"}  # ranking -> its reading


@dataclass(frozen=True)
class Scenes:
    """The scenes on which pictures and text are compared.

    Attributes:
        domain: of the haystacks.
        n: number of scenes; one half finds heads, the other tests them.
        k: size of each top set.
        n_random: number of random sets to compare with.
        seed: for scenes and sets.
        batch_size: samples per forward.
    """

    domain: str
    n: int
    k: Amount
    n_random: int
    seed: int = 0
    batch_size: int = 16


def scenes(domain: str, n: int, seed: int) -> dict[str, Samples]:
    """The same scenes, with three-digit numbers, shown and written out."""
    return {form: haystacks(domain, n, seed, answer="number", form=form) for form in FORMS}


def forms_in(
    results: Study,
    key: str,
    model: HookedMLLM,
    base: Callable[[], HookedMLLM],
    of: Scenes,
    say: NamedProgress,
) -> dict[str, xr.Dataset]:
    """What pictures and text share, and how much the heads of each matter for the other; computed or read back.

    Args:
        results: the study.
        key: prefix under which the results are saved.
        model: a hooked model.
        base: opens the same model before tuning.
        of: the scenes, and how many heads are compared.
        say: called with (what, done, in all).

    Cost: eight forwards and a reference in both forms for each scene that finds heads; ``4 + n_random`` forwards in
    both forms for each scene that tests them.
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
