"""Reference activations of heads as one unit of work: computed once, by whichever process has the model, and stored.

bank = reference_of(model, find, batch_size=8, seed=0)      # what reference_activations gives
"""

import torch
import xarray as xr

from mech.data.samples import Samples
from mech.identity import weight_digest
from mech.interventions import Reference, reference_activations
from mech.interventions.specs import Z
from mech.model import HookedMLLM
from mech.scale.measures import in_one_piece


def reference_of(model: HookedMLLM, samples: Samples, *, batch_size: int = 8, seed: int = 0) -> Reference:
    """``reference_activations`` of the heads; inside ``mech.on_folder`` and ``mech.on_ray`` a worker computes them.

    Args:
        model: a hooked model.
        samples: the reference samples; none of the tested ones.
        batch_size: samples per forward.
        seed: for the draws.

    Raises:
        ExperimentError: no samples.

    Cost: one forward per sample.
    """
    found = means_and_draws(model, samples, batch_size=batch_size, seed=seed)
    mean, draws = (torch.from_numpy(found[name].values).to(model.device) for name in ("mean", "draws"))
    return Reference(mean, draws, samples.digest(), Z, str(model.name), weight_digest(model) or "")


@in_one_piece("reference")
def means_and_draws(model: HookedMLLM, samples: Samples, *, batch_size: int, seed: int) -> xr.Dataset:
    """The arrays of ``reference_activations``."""
    found = reference_activations(model, samples, batch_size=batch_size, seed=seed)
    each, (mean, draws) = ("layer", "head", "d_head"), (values.cpu().numpy() for values in (found.mean, found.draws))
    return xr.Dataset({"mean": (("kind", *each), mean), "draws": (("kind", "draw", *each), draws)})
