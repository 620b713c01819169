"""What an experiment refuses before its first forward: heads of another model, samples without evidence, samples that
chose what they test.
"""

from collections.abc import Iterable, Sequence

from mech.data.samples import Samples
from mech.errors import ExperimentError
from mech.experiments.ranking.ranking import Ranking
from mech.identity import made_elsewhere
from mech.model import HookedMLLM


def refuse_ranking(ranking: Ranking, model: HookedMLLM, samples: Samples, allow_other_model: bool = False) -> str:
    """Refuse heads of another model, and heads that were found on the samples to test.

    Returns:
        The other model in words, where one is allowed and the heads are of one; else "".
    """
    refuse_overlap(samples, ranking.examples, "found the heads")
    return refuse_other_model(ranking, model, allow_other_model)


def refuse_other_model(ranking: Ranking, model: HookedMLLM, allow_other_model: bool = False) -> str:
    """Refuse heads of another model: of another shape always, of other weights unless they are allowed."""
    if (ranking.layers, ranking.n_heads) != (model.cfg.attention_layers, model.cfg.n_heads):
        raise ExperimentError(
            f"a ranking of {ranking.n_layers} x {ranking.n_heads} heads",
            f"{len(model.cfg.attention_layers)} x {model.cfg.n_heads}, as {model.name} has",
            "rank the heads of this model",
        )
    return made_elsewhere("a ranking", ranking.model, ranking.weights, model, allow_other_model)


def other_model_attrs(others: Iterable[str]) -> dict[str, str]:
    """The attribute of a result that says which parts of it another model made; none where none did."""
    named = list(dict.fromkeys(filter(None, others)))
    return {"other_model": "; ".join(named)} if named else {}


def refuse_without_evidence(samples: Samples) -> None:
    """Refuse samples that do not say where their evidence is."""
    lacking = [name for name, sample in zip(samples.names, samples, strict=True) if not sample.evidence]
    if lacking:
        raise ExperimentError(
            f"{len(lacking)} samples have no evidence, the first is {lacking[0]!r}",
            "samples that say where the evidence is",
            "set Sample(evidence=(mech.Box(...),))",
        )


def refuse_overlap(samples: Samples, others: Sequence[str], what: str) -> None:
    """Refuse samples that are tested on what they were chosen by; they are compared by their ids."""
    shared = [sample.id for sample in samples if sample.id and sample.id in set(others)]
    if shared:
        raise ExperimentError(
            f"{len(shared)} of the samples to test {what}, the first is {shared[0]!r}",
            "samples that were not used before",
            "use find, test = samples.split(0.5)",
        )
