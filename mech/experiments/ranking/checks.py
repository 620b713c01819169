"""What is refused before the first forward: another model's heads, no evidence, samples that chose what they test."""

from collections.abc import Iterable, Sequence

from mech.data.samples import Samples
from mech.errors import ExperimentError
from mech.experiments.ranking.ranking import Ranking
from mech.identity import made_elsewhere
from mech.model import HookedMLLM


def refuse_ranking(ranking: Ranking, model: HookedMLLM, samples: Samples, allow_other_model: bool = False) -> str:
    """Refuse heads of another model, and heads that were found on the test samples.

    Returns:
        A description of the other model if the heads come from one and that is allowed; else "".
    """
    refuse_overlap(samples, ranking.examples, "found the heads")
    return refuse_other_model(ranking, model, allow_other_model)


def refuse_other_model(ranking: Ranking, model: HookedMLLM, allow_other_model: bool = False) -> str:
    """Refuse heads of another model: always if its shape differs, and if its weights differ unless this is allowed."""
    if (ranking.layers, ranking.n_heads) != (model.cfg.attention_layers, model.cfg.n_heads):
        raise ExperimentError(
            f"a ranking of {ranking.n_layers} x {ranking.n_heads} heads",
            f"{len(model.cfg.attention_layers)} x {model.cfg.n_heads}, as {model.name} has",
            "rank the heads of this model",
        )
    return made_elsewhere("a ranking", ranking.model, ranking.weights, model, allow_other_model)


def other_model_attrs(others: Iterable[str]) -> dict[str, str]:
    """The attribute of a result that names the other models that made parts of it; empty if there are none."""
    named = list(dict.fromkeys(filter(None, others)))
    return {"other_model": "; ".join(named)} if named else {}


def refuse_without_evidence(samples: Samples) -> None:
    """Refuse samples without evidence."""
    lacking = [name for name, sample in zip(samples.names, samples, strict=True) if not sample.evidence]
    if lacking:
        raise ExperimentError(
            f"{len(lacking)} samples have no evidence, the first is {lacking[0]!r}",
            "samples that say where the evidence is",
            "set Sample(evidence=(mech.Box(...),))",
        )


def refuse_overlap(samples: Samples, others: Sequence[str], what: str) -> None:
    """Refuse to test on samples that were already used to choose what is tested; samples are compared by id."""
    shared = [sample.id for sample in samples if sample.id and sample.id in set(others)]
    if shared:
        raise ExperimentError(
            f"{len(shared)} of the samples to test {what}, the first is {shared[0]!r}",
            "samples that were not used before",
            "use find, test = samples.split(0.5)",
        )
