"""``acceleration`` inside a study: every ranking, setting and timing is saved as soon as it is there.

    {key}/rankings.nc       choice x layer x head: the scores the dense heads were chosen by
    {key}/settings.nc       condition x example: accuracy and logit difference of every setting
    {key}/speed.nc          timed x turn: measured once, on the machine and at the moment of the study

What is there is not computed again, so that a study that was killed ends in the same numbers.
"""

from collections.abc import Sequence

import xarray as xr

from mech.axes import CONDITION
from mech.data.samples import Samples
from mech.experiments.ranking.ranking import Ranking
from mech.model import HookedMLLM
from mech.results import Study
from mech.sparse.frontier.acceleration import CHOICES, Local, Progress, about, measured, ranked, settings, timed
from mech.sparse.frontier.speed import speed_dataset


def acceleration_in(
    place: Study,
    key: str,
    model: HookedMLLM,
    find: Samples,
    test: Samples,
    local: Local,
    *,
    shares: tuple[int | float, ...],
    choices: Sequence[str] = CHOICES,
    n_random: int,
    batch_size: int,
    seed: int,
    say: Progress,
) -> xr.Dataset:
    """What ``acceleration`` returns, computed or found in a study."""
    if not all(sample.counterfactual for sample in find):
        choices = tuple(choice for choice in choices if choice != "causal")

    def tell(what: str, done: int, total: int) -> None:
        say(f"{key}: {what}", done, total)

    if not place.done(f"{key}/rankings"):
        made = dict(ranked(model, find, choices, local, set(), batch_size, seed, tell))
        maps = {name: (("layer", "head"), ranking.mean) for name, ranking in made.items()}
        place.put(f"{key}/rankings", xr.Dataset(maps, {"layer": list(model.cfg.attention_layers)}))
    saved = place.get(f"{key}/rankings")
    rankings = {
        str(name): Ranking(values.values, None, str(name), str(model.name), layers=model.cfg.attention_layers)
        for name, values in saved.data_vars.items()
    }
    todo = settings(model, rankings, choices, shares, n_random, seed)
    missing = place.missing(f"{key}/settings", len(todo))
    parts = measured(model, test, [todo[i] for i in missing], local, batch_size) if missing else ()
    for done, (index, part) in enumerate(zip(missing, parts, strict=True), start=len(todo) - len(missing) + 1):
        place.append(f"{key}/settings", part, index)
        tell("settings", done, len(todo))
    if not place.done(f"{key}/settings"):
        place.finish(f"{key}/settings", len(todo), CONDITION, **about(model, test, find, local, seed))
    if not place.done(f"{key}/speed"):
        tell("speed", 0, 1)
        place.put(f"{key}/speed", speed_dataset(model, next(iter(test)), timed(todo), local.policy))
        tell("speed", 1, 1)
    return joined(place, key)


def joined(place: Study, key: str) -> xr.Dataset:
    """The settings of a study with their speed beside them."""
    return xr.merge([place.get(f"{key}/settings"), place.get(f"{key}/speed")], combine_attrs="no_conflicts")
