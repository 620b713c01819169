"""Necessity and sufficiency of one set of heads, side by side, each compared with random heads.

    found = both_ways(runs, ranking, Pull(0.05, bias=(4, 16)))
    found.set_noised, found.redirected         # share of the gap lost without the set; answers that follow it elsewhere

If noising these heads together takes the answer away, the answer *needs* them. If pulling them to another region of the
same picture (``mech.redirection``) takes the answer along, they *choose* where it comes from. Heads that only pass the
answer on are necessary and choose nothing. The same number of random heads shows what any set does; all heads show what
the bias does to the model as a whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import xarray as xr

from mech.data.samples import Samples
from mech.experiments.ablation.redirection import drawn_distractors, redirection
from mech.experiments.causal.runs import Runs
from mech.experiments.causal.sufficiency import BANDS
from mech.experiments.ranking.ranking import Heads, Ranking
from mech.interventions import Redirect
from mech.model import HookedMLLM

BIASES = (4.0, 8.0, 16.0)
UNIT = {"unit": "share of the gap in logit difference", "sign": "positive: the answer needs the set"}


def refuse_pull(model: HookedMLLM, samples: Samples, bias: Sequence[float], seed: int) -> str:
    """Why heads cannot be pulled on these samples; "" if they can.

    Raises:
        ExperimentError: a bias that is too large, or an answer that equals its distractor's.
        RegionError: a distractor that covers no token.
    """
    if not len(bias):
        return "it was left out"
    if lacking := [sample.id or str(i) for i, sample in enumerate(samples) if not sample.distractors]:
        return f"{len(lacking)} samples have no distractors, the first is {lacking[0]}"
    for strength in bias:
        Redirect([(model.cfg.attention_layers[0], 0)], "image", strength)
    drawn_distractors(model, samples, seed)
    return ""


@dataclass(frozen=True)
class Pull:
    """How heads are pulled towards distractors; see ``redirection``."""

    heads: int | float
    bias: Sequence[float] = BIASES
    n_random: int = 3
    seed: int = 0
    batch_size: int = 16
    allow_other_model: bool = False


def both_ways(runs: Runs, ranking: Ranking, pull: Pull) -> xr.Dataset:
    """What ``redirection`` measures for top, random and all heads, and what each set costs when it is noised.

    Returns:
        The variables of ``redirection``, and ``set_noised`` over (set, example).

    Cost: a forward for each sample, set and bias, one for each sample and set, and one for each sample.
    """
    options = {field.name: getattr(pull, field.name) for field in fields(Pull)}
    found = redirection(runs.model, runs.samples, ranking, bands=BANDS, **options)
    first = ranking.top(pull.heads)
    random = ranking.random(pull.heads, pull.n_random, pull.seed, exclude=first)
    sets: list[Heads] = [first, *random, ranking.heads]  # as in BANDS
    noised = [runs.lost(some) for some in sets]
    found["pulled"] = found["heads"]
    found["set_noised"] = (("set", "example"), np.array(noised), UNIT)
    return found.drop_vars("heads")
