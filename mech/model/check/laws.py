"""What must be true of every wrapped model, as functions: ``law(model, batches)`` yields ``Finding``s.

    batches = make_batches(model)
    for finding in parity(model, batches):
        print(finding.where, finding.ok, finding.deviation)

``LAWS`` lists them; ``mech.model.check.run`` runs them, on a checkpoint or on tiny random models of every family. The
oracle, where there is one, is the stock Hugging Face model: run with SDPA, or with a torch hook written here. A
deviation is the largest difference over real (not padded) positions, relative to the largest value of the clean run or
to 1, whichever is larger.

Laws look at all layers only with ``full=True``. Otherwise they look at the first and the last layer of every kind (a
kind is a set of points and a type of attention), which keeps models with billions of parameters affordable. Costs are
stated with ``s`` for the number of layers looked at in both stacks; nothing larger than one layer's activations is held
at a time. Laws cannot tell whether the weights are right, or what a chat template should say.
"""

from collections.abc import Callable, Iterator
from typing import Any

from mech.model.check.geometry import geometry
from mech.model.check.points import liveness, meaning, names
from mech.model.check.projections import weights
from mech.model.check.running import cleanliness, encoding, generation, padding, parity, serving
from mech.model.check.trial import Batches, Finding, make_batches

LAWS: dict[str, Callable[[Any, Batches], Iterator[Finding]]] = {
    "parity": parity,
    "names": names,
    "liveness": liveness,
    "meaning": meaning,
    "weights": weights,
    "padding": padding,
    "generation": generation,
    "serving": serving,
    "encoding": encoding,
    "cleanliness": cleanliness,
    "geometry": geometry,
}

__all__ = ["LAWS", "Batches", "Finding", "make_batches"]
