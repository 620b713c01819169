"""``acceleration`` inside a study: every ranking, setting and timing is saved as soon as it is done.

    {key}/rankings.nc       choice x layer x head: the scores the dense heads were chosen by
    {key}/settings.nc       condition x example: accuracy and logit difference of every setting
    {key}/speed.nc          timed x turn: measured once, on the machine and at the moment of the study

Saved results are not computed again, so a killed study, when resumed, ends with the same numbers.
"""

from dataclasses import replace

import xarray as xr

from mech.arguments import NamedProgress
from mech.axes import CONDITION
from mech.data.samples import Samples
from mech.experiments.ranking.ranking import Ranking
from mech.model import HookedMLLM
from mech.results import Study
from mech.sparse.frontier.acceleration import Grid, Local, about, measured, ranked, settings, timed
from mech.sparse.frontier.speed import speed_dataset


def acceleration_in(
    results: Study,
    key: str,
    model: HookedMLLM,
    split: tuple[Samples, Samples],
    local: Local,
    grid: Grid,
    say: NamedProgress,
) -> xr.Dataset:
    """The result of ``acceleration``, computed or read from a study; ``split``: samples that rank, and that test."""
    find, test = split
    if not all(sample.counterfactual for sample in find):
        grid = replace(grid, choices=tuple(choice for choice in grid.choices if choice != "causal"))

    def tell(what: str, done: int, total: int) -> None:
        say(f"{key}: {what}", done, total)

    if not results.done(f"{key}/rankings"):
        made = dict(ranked(model, find, grid, local, set(), tell))
        maps = {name: (("layer", "head"), ranking.mean) for name, ranking in made.items()}
        results.put(f"{key}/rankings", xr.Dataset(maps, {"layer": list(model.cfg.attention_layers)}))
    saved = results.get(f"{key}/rankings")
    rankings = {
        str(name): Ranking(values.values, None, str(name), str(model.name), layers=model.cfg.attention_layers)
        for name, values in saved.data_vars.items()
    }
    todo = settings(model, rankings, grid)
    missing = results.missing(f"{key}/settings", len(todo))
    parts = measured(model, test, [todo[i] for i in missing], local, grid.batch_size) if missing else ()
    for done, (index, part) in enumerate(zip(missing, parts, strict=True), start=len(todo) - len(missing) + 1):
        results.append(f"{key}/settings", part, index)
        tell("settings", done, len(todo))
    if not results.done(f"{key}/settings"):
        results.finish(f"{key}/settings", len(todo), CONDITION, **about(model, test, find, local, grid.seed))
    if not results.done(f"{key}/speed"):
        tell("speed", 0, 1)
        results.put(f"{key}/speed", speed_dataset(model, next(iter(test)), timed(todo), local.policy))
        tell("speed", 1, 1)
    return joined(results, key)


def joined(results: Study, key: str) -> xr.Dataset:
    """The settings of a study, merged with their speed."""
    return xr.merge([results.get(f"{key}/settings"), results.get(f"{key}/speed")], combine_attrs="no_conflicts")
