"""Circuit localisation tasks: a model, samples that find and samples that test, and the truth if it is planted.

task = circuit_task("mover")                              # a planted circuit, its edges known
task = CircuitTask("digits", model, find, test)           # any model and samples with counterfactuals; no truth
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from mech.arguments import Seed, Text, checked, one_of
from mech.data.samples import Samples, SomeSamples
from mech.errors import ExperimentError
from mech.experiments.circuit_tasks.graph import Shape
from mech.experiments.metrics import LogitDiff
from mech.experiments.paths.ends import Node, ends_of
from mech.experiments.ranking.checks import refuse_overlap
from mech.model import HookedMLLM
from mech.reference import planted


@checked
@dataclass(frozen=True, eq=False)
class CircuitTask:
    """The task that entries are compared on.

    Attributes:
        name: of the task.
        model: a hooked model.
        find: samples with counterfactuals, on which entries score edges.
        test: other samples, on which circuits are measured.
        truth: 1 for edges that carry the answer, 0 for those that do not, nan where unknown; over (sender, receiver) as
            in ``CircuitGraph``. None if nothing is known.
    """

    name: Text
    model: HookedMLLM = field(repr=False)
    find: SomeSamples = field(repr=False)
    test: SomeSamples = field(repr=False)
    truth: Float[np.ndarray, "sender receiver"] | None = field(default=None, repr=False)

    def __post_init__(self):
        find, test = Samples(self.find), Samples(self.test)
        object.__setattr__(self, "find", find)
        object.__setattr__(self, "test", test)
        lacking = [sample.id or str(i) for some in (find, test) for i, sample in enumerate(some)
                if sample.counterfactual is None]  # fmt: skip
        if lacking or min(len(find), len(test)) < 2:
            what = (
                f"{len(lacking)} samples without a counterfactual, the first is {lacking[0]!r}"
                if lacking
                else "one sample"
            )
            raise ExperimentError(what, "two samples or more to find and to test, with counterfactuals",
                                  "use with_counterfactuals(model, samples)")  # fmt: skip
        refuse_overlap(test, [sample.id for sample in find], "score the edges")
        shape = Shape.of(self.model).exists.shape
        if self.truth is not None and self.truth.shape != shape:
            raise ExperimentError(f"truth of shape {self.truth.shape}", f"{shape}, as the edges of the model", "")

    def metric(self, samples: SomeSamples) -> LogitDiff:
        """Logit of the answer minus logit of the counterfactual's, sample by sample."""
        others = [sample.counterfactual for sample in samples if sample.counterfactual is not None]
        return LogitDiff([sample.answer for sample in samples], [other.answer for other in others])


@checked
def circuit_task(
    name: one_of(planted.NAMES) = "mover",
    *,
    family: one_of(planted.FAMILIES) = "llava",
    n: int = 16,
    seed: Seed = 0,
) -> CircuitTask:
    """A planted circuit as a task: ``n`` pictures that find edges, ``n`` others that test, and the edges that matter.

    True edges are those whose switching alone changes the answer, in either run and with either sign. The truth is
    known for every edge out of a head; edges out of the embeddings and of MLPs have no stated truth and do not count in
    the AUROC.

    Args:
        name: one of ``mech.reference.planted.NAMES``.
        family: the architecture.
        n: samples of each half.
        seed: for the pictures.

    Raises:
        UnsupportedModel: a circuit that this family does not have.
        ExperimentError: fewer than two samples.
    """
    key = planted.circuit(name, family)
    model = HookedMLLM.from_hf(key.model, key.processor)
    return CircuitTask(
        f"{name} ({family})", model, key.samples(n, 2 * seed), key.samples(n, 2 * seed + 1), planted_truth(key, model)
    )


def planted_truth(key: planted.Planted, model: HookedMLLM) -> Float[np.ndarray, "sender receiver"]:
    """1 for the edges of a planted circuit, 0 for other edges out of heads, nan elsewhere."""
    shape = Shape.of(model)
    senders, receivers = list(shape.senders), list(shape.receivers)
    from_heads = np.array([node.kind == "head" for node in senders])[:, None]
    truth = np.where(shape.exists & from_heads, 0.0, np.nan)
    for (role, receiver), effect in key.truth.edges.items():
        if effect != planted.NOTHING:
            truth[senders.index(Node("head", *key.truth.heads[role])), receivers.index(_read(key, model, receiver))] = 1
    return truth


def _read(key: planted.Planted, model: HookedMLLM, receiver: str) -> Node:
    """A receiver named by role (``"retrieval.v"``, ``"mlp.1"``) as a node."""
    role, _, letter = receiver.partition(".")
    if role in key.truth.heads:
        layer, head = key.truth.heads[role]
        group = model.cfg.n_heads // model.cfg.kv_heads[layer]
        receiver = f"L{layer}H{head}.q" if letter == "q" else f"L{layer}K{head // group}.{letter}"
    (node,) = ends_of(model, "receivers", [receiver])[receiver]
    return node
