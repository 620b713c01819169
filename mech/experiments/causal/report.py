"""Does attention imply causal effect? Every head's RAM next to its effect, with intervals, tests, sets and paths.

    find, test = samples.split(0.5)
    report = causal_report(model, test, find=find)
    report.heads                        # [layer, head]: ram, lost, recovered, direct, mediated, ablated, quadrant, ...
    report.smallest                     # how many heads lose half of the gap: by greedy search, by RAM, at random
    report.paths[1, 0].carrier          # "through the values of L4H2"
    report.redirection                  # answers that follow the top heads to a distractor, by band and bias
    print(*report.sentences(), sep="\\n")

The samples need counterfactuals: the same layout with other evidence, and so another answer. A head is *necessary* if
the answer is lost when its output is replaced by its output on the counterfactual (noising), and *sufficient* if its
clean output alone restores the answer in the corrupted run (denoising). The ranking's top heads together are also
tested for whether they choose the evidence: pulled to a distractor, do they take the answer along? Effects are shares
of the gap in logit difference between the two runs. Samples that find heads (``find``: the ranking, the order of sets)
never test them.

This does not show what a head does on other kinds of questions, nor anything about heads whose output is the same in
both runs (ablation sees those, patching does not).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from mech.arguments import Amount, Count, NamedProgress, Positive, Seed, Share, Whole, checked, given_by, one_of
from mech.data.samples import Samples, SomeSamples
from mech.deprecation import renamed
from mech.experiments.ablation.bank import reference_of
from mech.experiments.causal.both_ways import BIASES, Pull, both_ways, refuse_pull
from mech.experiments.causal.heads import (
    BACK,
    HALF,
    QUADRANTS,
    Criteria,
    Sweeps,
    ablated,
    agreement_of,
    cut_sweeps,
    followed,
    heads_of,
    ordered,
    single_effects,
    singles_of,
)
from mech.experiments.causal.mediation import HeadPath, paths_of
from mech.experiments.causal.runs import Runs
from mech.experiments.causal.sets import set_curves, sizes_of, smallest
from mech.experiments.causal.sufficiency import facts_of, redirection_of, sentence_of
from mech.experiments.ranking.checks import other_model_attrs, refuse_overlap, refuse_ranking
from mech.experiments.ranking.ranking import Head, Ranking, rank_heads
from mech.experiments.scores.ram import retrieval_attention_mass
from mech.experiments.statistics import bootstrap_interval
from mech.interventions import METHODS, Reference
from mech.interventions.specs import Z
from mech.model import HookedMLLM
from mech.notebook import Shown
from mech.results import check, load, provenance, save
from mech.results.older import LABELS
from mech.scale.measures import in_one_piece, running


@checked
def causal_report(
    model: HookedMLLM,
    samples: SomeSamples,
    ranking: Ranking | None = None,
    *,
    find: SomeSamples | None = None,
    reference: Samples | Reference | None = None,
    method: one_of(METHODS) | None = "mean",
    threshold: Positive = 0.02,
    alpha: Share = 0.05,
    n_random: Count = 3,
    n_boot: Count = 2000,
    n_paths: Whole = 4,
    top: Amount = 0.05,
    bias: Sequence[float] = BIASES,
    batch_size: Count = 16,
    seed: Seed = 0,
    progress: NamedProgress | None = None,
    allow_other_model: bool = False,
) -> "CausalReport":
    """RAM against causal effect for every head, the sets the answer depends on, and the paths of heads that matter.

    ``lost = (clean - noised) / gap``, ``recovered = (denoised - corrupted) / gap`` with ``gap`` the mean over samples
    of clean minus corrupted; ``direct`` is ``lost`` when only the final norm sees the head's change, ``mediated`` the
    rest; ``ablated`` the loss under ablation by ``method``. A head *attends* if its RAM exceeds that of even attention
    by a twentieth of the rest, with its interval above even attention; it is *causal* if ``lost`` or ``recovered`` is
    at least ``threshold`` and differs from 0 (sign-flip test over samples, Benjamini-Hochberg over all heads and both
    directions).

    Sign: positive if the answer needs the head. Unit: share of the gap in logit difference.

    Args:
        model: a hooked model.
        samples: test samples, with counterfactuals.
        ranking: by attention to the evidence, from samples not in ``samples``; by RAM on ``find`` if None.
        find: samples that rank heads and order sets; half of ``samples`` if None.
        reference: for the ablation; ``find`` if None.
        method: for ablating single heads, see ``Ablate``; None to leave it out.
        threshold, alpha: the smallest effect that matters, and the level of the tests.
        n_random, n_boot: how many random orders of heads to compare with the greedy ones, and resamples per interval.
        n_paths: how many heads' paths are followed; those that matter without attending come first.
        top: how many top heads of the ranking are noised together, and pulled to a distractor together.
        bias: for the redirection, see ``Redirect``; empty to leave it out (always left out if samples lack
            distractors).
        batch_size, seed, allow_other_model: as in ``ablation``.
        progress: called with (what, done, in all).

    Raises:
        ExperimentError: samples without a counterfactual, samples that found the heads, or a model that does not tell
            samples from counterfactuals.

    Cost: three sweeps over all heads for each test sample (noising, denoising, ablation) and two for each sample of
    ``find``; for the redirection one forward for each sample, set (top, random, all heads) and bias, and one more for
    each set.

    References: arXiv 2404.15255 (noising and denoising), 2211.00593 (direct effects, faithfulness; completeness here is
    the loss, not the difference from the whole model's), 2307.15771 (self-repair), 2606.14703 (redirection).
    """
    say = progress or (lambda what, done, total: None)
    samples = Samples(samples)
    if find is None:
        find, samples = samples.split(0.5, seed)
    find = Samples(find)
    refuse_overlap(samples, [sample.id for sample in find], "find the heads")
    unpulled = refuse_pull(model, samples, bias, seed)
    if ranking is None:
        ranking = rank_heads(retrieval_attention_mass(model, find, batch_size=batch_size))
    others = [refuse_ranking(ranking, model, samples, allow_other_model)]
    if isinstance(reference, Reference):
        others.append(reference.check(model, Z, allow_other_model))
    asked = Asked(method, n_paths, unpulled, Criteria(threshold, alpha, n_boot, seed),
                  Pull(top, tuple(bias), n_random, seed, batch_size, allow_other_model))  # fmt: skip
    sweeps: dict[str, Any] = {}
    if running() is not None:
        sweeps = {name: cut_sweeps(model, some, say) for name, some in (("find", find), ("test", samples))}
    whole = measured(
        model, samples, find=find, ranking=ranking, reference=reference, asked=asked, sweeps=sweeps, progress=say
    )  # fmt: skip
    return CausalReport(whole.assign_attrs(other_model_attrs(others)))


@dataclass(frozen=True)
class Asked:
    """The options of ``causal_report`` besides samples, see there; ``unpulled`` says why no heads are pulled."""

    method: str | None
    n_paths: int
    unpulled: str
    criteria: Criteria
    pull: Pull


@in_one_piece("causal report", classes=(Asked, Criteria, Pull, Ranking, Head, Reference))
def measured(
    model: HookedMLLM,
    samples: Samples,
    *,
    find: Samples,
    ranking: Ranking,
    reference: Samples | Reference | None,
    asked: Asked,
    sweeps: Mapping[str, Sweeps],
    progress: NamedProgress | None = None,
) -> xr.Dataset:
    """The dataset of ``causal_report``; ``sweeps`` over ``find`` and ``test`` are measured here if not known."""
    say, pull, criteria = progress or (lambda what, done, total: None), asked.pull, asked.criteria
    seed, batch_size, options = pull.seed, pull.batch_size, {"allow_other_model": pull.allow_other_model}
    orders, lost_find = ordered(Runs.of(model, find, batch_size), ranking, say, sweeps.get("find"))
    orders |= {"ram": ranking.heads}
    drawn = ranking.random(len(ranking) // 2, pull.n_random, seed)
    orders |= {f"random {i}": heads for i, heads in enumerate(drawn)}
    runs = Runs.of(model, samples, batch_size)
    pulled = xr.Dataset()
    if not asked.unpulled:
        pulled = both_ways(runs, ranking, pull).drop_attrs()
        say("redirecting", 1, 1)
    each, no_paths = single_effects(runs, say, sweeps.get("test"))
    if asked.method is not None:
        bank = reference
        if not isinstance(bank, Reference):
            bank = reference_of(model, Samples(bank or find), batch_size=batch_size, seed=seed)
        each["ablated"] = ablated(runs, asked.method, bank, batch_size, say, seed=seed, **options)
    heads = heads_of(runs, ranking, each, criteria)
    heads["lost_find"] = (("layer", "head"), lost_find, {"unit": "share of the gap, on the samples that find heads"})
    curves = set_curves(runs, orders, sizes_of(len(ranking)), singles_of(heads, ranking))
    paths = [] if no_paths else paths_of(runs, followed(heads, asked.n_paths), criteria.threshold, say)
    whole = _joined(samples, each, [heads, curves, pulled])
    whole.attrs.update(
        kind="causal", model=model.name, domain=", ".join(samples.domains), method=asked.method or "none",
        threshold=criteria.threshold, alpha=criteria.alpha, gap=runs.gap, score=ranking.score, n_find=len(find),
        no_paths=no_paths, no_redirection=asked.unpulled,
        unit="share of the gap in logit difference between clean and corrupted runs",
        sign="positive: the answer needs it",
        agreement=json.dumps(agreement_of(ranking.mean, each["lost"], criteria.n_boot, seed)),
        paths=json.dumps([path.to_json() for path in paths]),
        members=json.dumps({name: [list(head) for head in some] for name, some in orders.items()}),
        provenance=provenance(
            model, {"find": find, "test": samples}, seed=seed, method=asked.method, threshold=criteria.threshold
        ),
    )  # fmt: skip
    return whole


def _joined(samples: Samples, each: dict[str, np.ndarray], parts: list[xr.Dataset]) -> xr.Dataset:
    """All parts in one dataset, with the effects of every sample next to their means."""
    values = {f"{name}_each": (("example", "layer", "head"), value) for name, value in each.items()}
    ids = [sample.id or str(i) for i, sample in enumerate(samples)]
    return xr.merge([part.assign_coords(example=ids) for part in (*parts, xr.Dataset(values))])


@checked
@dataclass(frozen=True, eq=False, repr=False)
class CausalReport(Shown):
    """The result of ``causal_report``, all of it in one dataset."""

    dataset: given_by("causal_report", "lost", "recovered")

    @property
    def heads(self) -> xr.Dataset:
        """Every head: ``ram``, ``ram_rank``, the effects with ``_low`` and ``_high``, p-values, ``quadrant``."""
        return self.dataset[[name for name, v in self.dataset.data_vars.items() if v.dims == ("layer", "head")]]

    @property
    def sets(self) -> xr.Dataset:
        """``set_lost``, ``set_recovered``, ``set_singles`` by order and size.

        "effect" is the greedy order by what is lost, "restoring" the one by what is recovered.
        """
        return self.dataset[["set_lost", "set_recovered", "set_singles"]]

    @cached_property
    def paths(self) -> dict[tuple[int, int], HeadPath]:
        """How each followed head acts."""
        found = [HeadPath.from_json(value) for value in json.loads(self.dataset.attrs["paths"])]
        return {(path.layer, path.head): path for path in found}

    @property
    def redirection(self) -> xr.Dataset | None:
        """What ``mech.redirection`` measures for top, random and all heads; None if heads were not pulled."""
        return redirection_of(self.dataset)

    @property
    def agreement(self) -> dict[str, float | None]:
        """Spearman correlation of RAM and ``lost`` over heads, with its interval over samples; None if undefined."""
        return json.loads(self.dataset.attrs["agreement"])

    @property
    def smallest(self) -> dict[str, dict[str, int | None]]:
        """For each order the smallest set size that loses half of the gap, and that recovers nine tenths of it."""
        return {"lost": smallest(self.sets, "lost", HALF), "recovered": smallest(self.sets, "recovered", BACK)}

    def members(self, order: str, size: int) -> list[Head]:
        """The heads of a set."""
        return [Head(*head) for head in json.loads(self.dataset.attrs["members"])[order][:size]]

    def quadrant(self, name: str) -> list[Head]:
        """The heads of one of ``QUADRANTS``, the largest effect first."""
        if name in LABELS:
            renamed(f"quadrant {name!r}", repr(LABELS[name]))
            name = LABELS[name]
        heads = self.heads
        size = np.maximum(np.abs(heads["lost"].values), np.abs(heads["recovered"].values))
        chosen = np.argwhere(heads["quadrant"].values == name)
        layers = heads["layer"].values
        return [Head(int(layers[i]), int(j)) for i, j in sorted(chosen.tolist(), key=lambda at: -size[tuple(at)])]

    @property
    def stand_ins(self) -> dict[Head, Head]:
        """Heads whose contribution grows when another head is noised -> that other head: self-repair on its path."""
        return {
            Head(leg.layer, leg.head): Head(path.layer, path.head)
            for path in self.paths.values()
            for leg in path.through
            if leg.head is not None and leg.effect < 0 < path.direct
        }

    def sentences(self) -> list[str]:
        """The report in words."""
        heads, attrs = self.heads, self.dataset.attrs
        counts = {name: len(self.quadrant(name)) for name in QUADRANTS}
        said = [f"{attrs['model']} on {attrs['domain']}: of {heads['ram'].size} heads "
                + "; ".join(f"{n} {name}" for name, n in counts.items()) + "."]  # fmt: skip
        # The smallest p of a sign-flip test is 2 / 2^n, and the correction is over all heads in both directions.
        n, needed = self.dataset.sizes["example"], math.ceil(math.log2(4 * heads["ram"].size / attrs["alpha"]))
        if n < needed:
            said.append(f"{n} samples are too few to show that a single head matters: that takes {needed}.")
        if self.agreement["mean"] is not None:
            mean, low, high = (self.agreement[name] for name in ("mean", "low", "high"))
            said.append(f"RAM and loss correlate over heads: Spearman {mean:.2f} [{low:.2f}, {high:.2f}].")
        for what, sizes in self.smallest.items():
            share = HALF if what == "lost" else BACK
            found = ", ".join(f"{size or 'none tried'} ({order})" for order, size in sizes.items())
            said.append(f"Smallest set with {share:.0%} of the gap {what}: {found}.")
        if (pulled := facts_of(self.dataset)) is not None:
            said.append(sentence_of(pulled))
        said += [self.describe(path) for path in self.paths.values()]
        said += [f"{head} stands in for {other} when that head is noised." for head, other in self.stand_ins.items()]
        return said

    def describe(self, path: HeadPath) -> str:
        """One head in a sentence: what it attends to, how large its effect is, and the path it takes."""
        head = self.heads.sel(layer=path.layer, head=path.head)
        lost, low, high = (100 * float(head[name]) + 0.0 for name in ("lost", "lost_low", "lost_high"))
        text = (
            f"L{path.layer}H{path.head} (RAM {float(head['ram']):.2f}, rank {int(head['ram_rank'])} of "
            f"{self.heads['ram'].size}): noised, {lost:.0f}% [{low:.0f}, {high:.0f}] of the gap is lost; denoised "
            f"alone, it recovers {float(head['recovered']):.0%}. It acts {path.carrier}"
        )
        if not any(abs(effect) >= self.dataset.attrs["threshold"] for effect in path.acts.values()):
            return text + "."
        read = max(path.reads, key=lambda region: path.reads[region], default="")
        reading = f", where it attends to the {PLACES[read]} ({path.reads[read]:.0%} of its attention)" if read else ""
        return f"{text}, from the {PLACES[path.where]}{reading}."

    def facts(self) -> dict[str, Any]:
        """What a study's summary records of it, in plain numbers."""
        heads, attrs = self.heads, self.dataset.attrs
        pulled = facts_of(self.dataset)
        together, size = self.sets["set_lost"].sel(order="effect"), self.smallest["lost"]["effect"]
        size = size or int(self.sets["size"][-1])
        worth = bootstrap_interval(together.sel(size=size).values).as_dict()
        alone = float(self.sets["set_singles"].sel(order="effect", size=size))
        return {
            "n_test": self.dataset.sizes["example"],
            "corruption": attrs.get("corruption", "counterfactuals"),
            "quadrants": {name: [list(head) for head in self.quadrant(name)] for name in QUADRANTS},
            "necessary_blind": [
                list(h) for h in self.quadrant(QUADRANTS[2]) if bool(heads["necessary"].sel(layer=h.layer, head=h.head))
            ],
            "agreement": self.agreement,
            "smallest": self.smallest,
            "set": {"size": size, "heads": [list(h) for h in self.members("effect", size)], "together": worth,
                    "alone": alone},
            "even": float(self.dataset["even"]),
            "threshold": attrs["threshold"],
            "redirection": pulled and {**pulled, "text": sentence_of(pulled)},
            "stand_ins": [[list(head), list(other)] for head, other in self.stand_ins.items()],
            "paths": [{"head": list(at), "carrier": path.carrier, "text": self.describe(path)}
                      for at, path in self.paths.items()],
        }  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write the dataset (netCDF)."""
        save(self.dataset, path)

    @classmethod
    def load(cls, path: str | Path) -> "CausalReport":
        """Read what ``save`` wrote."""
        return cls(check(load(path), "causal"))

    def __repr__(self) -> str:
        return f"CausalReport({self.sentences()[0]})"


PLACES = {"last": "last token", "evidence": "evidence", "picture": "rest of the picture", "question": "question",
          "template": "template"}  # fmt: skip
