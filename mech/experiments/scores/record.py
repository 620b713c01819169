"""The heads of one model by several scores, in one file that others can load and compare with their own.

    record = mech.head_record(model, samples, ("ram", "gaze", "contrastive", "gating"))
    record.to_json("heads.json")                         # or: mech rank --score ram,gaze --export heads.json
    ranking = mech.HeadRecord.from_json("heads.json").ranking("gaze")
    mech.ablation(model, test, ranking)                  # refused for another model, and on samples that found heads

Each score comes with its nulls and a 95% interval, and with the model, the digest of its weights and the samples it was
measured on. Only the ids of the samples are kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from mech.arguments import Amount, Count, Progress, Seed, checked
from mech.data.samples import Samples, SomeSamples
from mech.errors import ExperimentError, OutputError, suggestion
from mech.experiments.ranking.ranking import Ranking, rank_heads
from mech.experiments.scores.gating import causal_head_gating
from mech.experiments.scores.measure import head_scores
from mech.experiments.scores.published import NULLS, PUBLISHED, is_null, nulls
from mech.experiments.statistics import bootstrap_interval
from mech.model import HookedMLLM
from mech.notebook import Shown
from mech.results.provenance import data_record, jsonable, software_versions
from mech.results.store import read_json, write_json

KIND, SCHEMA = "heads", 1
GATING = "gating"
SCORES = (*PUBLISHED, GATING)
SIGN = "positive: helps the answer; negative: hinders it"
ABOUT = ("unit", "sign", "definition", "source")
Map = Float[np.ndarray, "layer head"]


@dataclass(frozen=True, eq=False)
class HeadScore:
    """One score of every head: its ranking, its 95% interval, and its value if nothing is retrieved.

    Attributes:
        ranking: heads by the mean over samples.
        low, high: 95% interval over samples (for ``gating`` over fits).
        null: ``even`` (attention spread evenly over the visible keys), ``elsewhere`` (the same head on regions of the
            same size elsewhere); for ``gating`` ``exchanged`` (fitted to other samples' answers); empty if the score
            has none, for instance because it is already calibrated.
        about: unit, sign, definition and source in words.
    """

    ranking: Ranking
    low: Map = field(repr=False)
    high: Map = field(repr=False)
    null: Mapping[str, Map] = field(repr=False)
    about: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True, eq=False)
class HeadRecord(Shown):
    """All scores of one model on some samples. Made by ``head_record``.

    Attributes:
        scores: the scores by name.
        n_top: size of the top set.
        data: digest, number and domains of the samples.
        version: of ``mech``.
    """

    scores: Mapping[str, HeadScore]
    n_top: int
    data: Mapping[str, Any] = field(repr=False)
    version: str = ""

    def ranking(self, name: str) -> Ranking:
        """The ranking by one score.

        Raises:
            ExperimentError: the score is not in the record.
        """
        if name not in self.scores:
            raise ExperimentError(
                f"no score {name!r} in this record", ", ".join(self.scores), suggestion(name, self.scores)
            )
        return self.scores[name].ranking

    @property
    def dataset(self) -> xr.Dataset:
        """Every score over (layer, head), as ``mech.view`` draws it."""
        found = xr.Dataset({name: one.ranking.scores() for name, one in self.scores.items()})
        for name, one in self.scores.items():
            found[name].attrs.update(one.about)
        return found.assign_attrs(model=next(iter(self.scores.values())).ranking.model)

    def to_json(self, path: str | Path | None = None) -> dict[str, Any]:
        """The record as plain values; if ``path`` is given, also written there."""
        first = next(iter(self.scores.values())).ranking
        value = {
            "kind": KIND, "schema": SCHEMA, "mech": self.version,
            "model": {"name": first.model, "weights": first.weights},
            "data": {**self.data, "domain": first.domain, "samples": list(first.examples)},
            "layers": list(first.layers), "n_heads": first.n_heads, "n_top": self.n_top,
            "scores": {
                name: {
                    **one.about, "mean": one.ranking.mean, "low": one.low, "high": one.high, "null": dict(one.null),
                    "top": [list(head) for head in one.ranking.top(self.n_top)],
                }
                for name, one in self.scores.items()
            },
        }  # fmt: skip
        value = jsonable(value)
        if path is not None:
            write_json(value, path)
        return value

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any]) -> "HeadRecord":
        """A record from the output of ``to_json``, as a path or a dict.

        Raises:
            OutputError: it cannot be read, has another schema, or has maps of another shape or with missing numbers.
        """
        where = "this record" if isinstance(source, Mapping) else str(source)
        try:
            value = source if isinstance(source, Mapping) else read_json(source)
            if value["kind"] != KIND or value["schema"] != SCHEMA:
                raise OutputError(
                    f"{where} of kind {value['kind']!r}, schema {value['schema']!r}", f"{KIND!r}, schema {SCHEMA}",
                    "read it with the version of mech that wrote it",
                )  # fmt: skip
            layers, shape = tuple(map(int, value["layers"])), (len(value["layers"]), int(value["n_heads"]))
            model, data = value["model"], value["data"]
            labels: dict[str, Any] = {"model": str(model["name"]), "weights": str(model["weights"])}
            labels |= {"domain": str(data["domain"]), "examples": tuple(map(str, data["samples"])), "layers": layers}
            scores = {}
            for name, one in value["scores"].items():
                mean, low, high = (_map(one[key], shape, f"{key} of {name}") for key in ("mean", "low", "high"))
                null = {str(word): _map(of, shape, f"{word} of {name}") for word, of in one["null"].items()}
                about = {key: str(one[key]) for key in ABOUT}
                scores[str(name)] = HeadScore(Ranking(mean, None, str(name), **labels), low, high, null, about)
            if not scores:
                raise ValueError("no scores")
            known = {key: data[key] for key in ("digest", "n", "domains")}
            return cls(scores, int(value["n_top"]), known, str(value["mech"]))
        except OutputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(
                f"{where} is not a record of heads ({error!r})", "the output of HeadRecord.to_json"
            ) from error


@checked
def head_record(
    model: HookedMLLM,
    samples: SomeSamples,
    scores: str | Sequence[str] = ("ram", "gaze", "contrastive", GATING),
    *,
    top: Amount = 0.05,
    batch_size: Count = 8,
    seed: Seed = 0,
    progress: Progress | None = None,
) -> HeadRecord:
    """Every head by several scores, each with its interval and nulls, from shared forwards.

    Sign and unit: see ``about`` of each score.

    Args:
        model: a hooked model.
        samples: the samples to find heads on, with what the scores need (evidence, distractors, answers).
        scores: names of ``PUBLISHED``, and ``"gating"``.
        top: size of the top set.
        batch_size: samples per forward.
        seed: seed of the regions elsewhere, and of the parts that gates are fitted on.
        progress: called with (done, total).

    Raises:
        ExperimentError: an unknown score, or samples without what it needs. Raised before any forward.

    Cost: that of ``head_scores``; with ``"gating"`` also twice ``causal_head_gating``.
    """
    names, samples = [scores] if isinstance(scores, str) else list(dict.fromkeys(scores)), Samples(samples)
    check_names(names)
    if GATING in names and (silent := [sample.id or str(i) for i, sample in enumerate(samples) if not sample.answer]):
        raise ExperimentError(
            f"{len(silent)} samples have no answer, the first is {silent[0]!r}", f"answers, which {GATING!r} needs",
            "set Sample.answer, or leave it out",
        )  # fmt: skip
    attending, options = [name for name in names if name != GATING], dict(batch_size=batch_size, seed=seed)
    found = _attended(model, samples, attending, **options, progress=progress) if attending else {}
    if GATING in names:
        found[GATING] = _gated(model, samples, **options, progress=progress)
    return _record(found, names, samples, top)


def record_of(
    samples: SomeSamples, found: xr.Dataset, gated: xr.Dataset | None = None, top: Amount = 0.05
) -> HeadRecord:
    """A record of scores that are already measured.

    Args:
        samples: the samples that ``found`` was measured on.
        found: the result of ``head_scores``; any ``nulls`` in it are attached to their scores.
        gated: the result of ``causal_head_gating``.
        top: size of the top set.
    """
    scores = _scored(found, [str(name) for name in found if not is_null(str(name))])
    if gated is not None:
        scores[GATING] = _score(rank_heads(gated, GATING), {}, {"sign": SIGN, **gated[GATING].attrs})
    return _record(scores, list(scores), Samples(samples), top)


def _record(scores: Mapping[str, HeadScore], names: Sequence[str], samples: Samples, top: int | float) -> HeadRecord:
    version = str(software_versions(["mech"])["mech"] or "")
    count = next(iter(scores.values())).ranking.count(top)
    return HeadRecord({name: scores[name] for name in names}, count, data_record(samples), version)


def check_names(names: Sequence[str]) -> None:
    """Refuse scores that a record cannot have.

    Raises:
        ExperimentError: no scores, or an unknown one.
    """
    if unknown := [name for name in names if name not in SCORES]:
        raise ExperimentError.unknown("score", unknown[0], SCORES)
    if not names:
        raise ExperimentError("no scores", "at least one", f"choose from {', '.join(SCORES)}")


def _attended(model: HookedMLLM, samples: Samples, names: Sequence[str], **options: Any) -> dict[str, HeadScore]:
    """Attention scores and their nulls, from the same forwards."""
    asked = {name: PUBLISHED[name] for name in names}
    even, elsewhere = (nulls(names, word) for word in NULLS)
    try:
        found = head_scores(model, samples, asked | even | elsewhere, **options)
    except ExperimentError:  # the evidence leaves no room for a region elsewhere
        found = head_scores(model, samples, asked | even, **options)
    return _scored(found, names)


def _scored(found: xr.Dataset, names: Sequence[str]) -> dict[str, HeadScore]:
    """Scores, with the nulls that were measured with them."""
    scored = {}
    for name in names:
        null = {word: (found[name] - found[f"{name} {word}"]).mean("example").values
                for word in NULLS if f"{name} {word}" in found}  # fmt: skip
        scored[name] = _score(rank_heads(found, name), null, found[name].attrs)
    return scored


def _gated(model: HookedMLLM, samples: Samples, **options: Any) -> HeadScore:
    """Causal head gating, and its null: gates fitted to other samples' answers."""
    found, null = causal_head_gating(model, samples, **options), {}
    listed = list(samples)
    others = [next((o.answer for o in (*listed[i + 1 :], *listed[:i]) if o.answer != sample.answer), None)
              for i, sample in enumerate(listed)]  # fmt: skip
    if None not in others:
        wrong = [replace(s, answer=o, spans=()) for s, o in zip(listed, others, strict=True) if o is not None]
        null["exchanged"] = causal_head_gating(model, wrong, **options)[GATING].mean("example").values
    about = {"sign": SIGN, **found[GATING].attrs}
    return _score(rank_heads(found, GATING), null, about)


def _score(ranking: Ranking, null: Mapping[str, Map], about: Mapping[str, Any]) -> HeadScore:
    low = high = ranking.mean
    if ranking.per_example is not None and len(ranking.per_example) > 1:
        interval = bootstrap_interval(ranking.per_example)
        low, high = interval.low, interval.high
    return HeadScore(ranking, low, high, null, {key: str(about.get(key, "")) for key in ABOUT})


def _map(values: Any, shape: tuple[int, int], what: str) -> Map:
    found = np.array(values, dtype=np.float64)
    if found.shape != shape or not np.isfinite(found).all():
        raise OutputError(
            f"{what} over {found.shape}", f"finite numbers over {shape}, layers and heads", "write it again"
        )
    return found
