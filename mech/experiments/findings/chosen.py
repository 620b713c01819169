"""Which heads and samples a study spares and shows, by rules that are fixed before the results are seen.

    known_necessary(patched)                        # spared by the control "unneeded": from the discovery split
    necessary_blind(patched, 2)                     # drawn next to the top heads
    representative(find, ram, ranking.top(0.05), 3) # samples whose pictures are drawn
    of_each_tenth(ranking)                          # ten heads from the first to the last
    drawn(model, samples, ranking, patched)         # their attention on those samples, ready for ``mech.view``

``patched`` is the dataset of a ``CausalReport``, or None if patching was not possible.
"""

from collections.abc import Sequence

import numpy as np
import xarray as xr

from mech.data.samples import Samples
from mech.errors import ExperimentError
from mech.experiments.attention.maps import attention_maps
from mech.experiments.patching.deciding import deciding_queries
from mech.experiments.ranking.ranking import Head, Ranking
from mech.experiments.scores.sinks import attention_sinks, definition_for, with_sinks
from mech.model import HookedMLLM
from mech.scale.measures import in_one_piece

SHOWN = 4  # top heads drawn over the pictures; half as many bottom and necessary ones
NECESSARY = 0.05  # share of the answer that a head must cost by itself to count as necessary


def known_necessary(patched: xr.Dataset | None) -> list[Head]:
    """Heads that cost at least a twentieth of the answer when patched on the discovery samples."""
    if patched is None or "lost_find" not in patched:
        return []
    return _heads(patched, patched["lost_find"].values >= NECESSARY)


def necessary_blind(patched: xr.Dataset | None, n: int) -> list[Head]:
    """Heads that are necessary but do not attend to the evidence, at most ``n``, most costly first."""
    if patched is None:
        return []
    blind = (patched["quadrant"].values == "causal, not attending") & patched["necessary"].values.astype(bool)
    cost = patched["lost"]
    return sorted(_heads(patched, blind), key=lambda at: -float(cost.sel(layer=at.layer).isel(head=at.head)))[:n]


def of_each_tenth(ranking: Ranking, parts: int = 10) -> list[Head]:
    """The head in the middle of each tenth of a ranking, best first; all heads if there are fewer than ten."""
    n = len(ranking.heads)
    return [ranking.heads[int((i + 0.5) / min(parts, n) * n)] for i in range(min(parts, n))]


def representative(samples: Samples, ram: xr.Dataset, heads: Sequence[tuple[int, int]], n: int) -> Samples:
    """Samples at evenly spaced quantiles of these heads' RAM, in increasing order: neither the first nor the best ones.

    Args:
        samples: the samples that ``ram`` was measured on.
        ram: the result of ``retrieval_attention_mass``.
        heads: the heads whose mean RAM orders the samples.
        n: how many samples; for three, those at quantiles 1/6, 1/2 and 5/6.
    """
    mass = np.mean([ram["ram"].sel(layer=layer, head=head).values for layer, head in heads], axis=0)
    order, n = np.argsort(mass, kind="stable"), min(n, len(mass))
    listed = list(samples)
    return Samples([listed[int(order[int((i + 0.5) / n * len(mass))])] for i in range(n)])


def drawn(model: HookedMLLM, samples: Samples, ranking: Ranking, patched: xr.Dataset | None) -> xr.Dataset:
    """What the first and last heads of a ranking and one head of each tenth attend to in some samples.

    If patching was possible, also necessary heads that do not attend to the evidence, each from the query at which it
    decides.
    """
    bands = {
        "top": ranking.top(SHOWN),
        "necessary": necessary_blind(patched, SHOWN // 2),
        "bottom": ranking.bottom(SHOWN // 2),
    }
    bands = {name: heads for name, heads in bands.items() if heads}
    return maps_of_bands(model, samples, ranking=ranking, bands=bands, spread=of_each_tenth(ranking))


@in_one_piece("pictures", classes=(Ranking, Head))
def maps_of_bands(
    model: HookedMLLM, samples: Samples, *, ranking: Ranking, bands: dict[str, Sequence[Head]], spread: list[Head]
) -> xr.Dataset:
    """The attention maps of some heads, each from the query at which it decides, if counterfactuals say where."""
    heads = [head for band in bands.values() for head in band]
    try:  # heads of the tenths are drawn from the question, which ranks them
        deciding = [[*deciding_queries(model, sample, heads), *[None] * len(spread)] for sample in samples]
    except ExperimentError:  # without counterfactuals, nothing says where a head decides
        deciding = None
    maps = attention_maps(model, samples, ranking, bands=bands | {"tenth": spread}, deciding=deciding)
    if model.cfg.cross_layers:  # pictures in a memory: its sinks are not known
        return maps
    return with_sinks(maps, model, samples, attention_sinks(model, samples, by=definition_for(model)))


def _heads(patched: xr.Dataset, chosen: np.ndarray) -> list[Head]:
    layers = patched["layer"].values
    return [Head(int(layers[i]), int(j)) for i, j in np.argwhere(chosen).tolist()]
