"""A study, end to end: which heads retrieve the evidence, whether they are needed, and how sure that is.

For every model and domain a study makes these results and saves each as soon as it is there:

    ram        RAM of every head, on the samples that find heads
    scores     the scores of the literature, on the samples that find heads: do they name the same ones?
    gating     causal head gating on a few of those samples; with the scores it is also written as ``heads.json``
    causal     does attention imply causal effect: every head patched from the counterfactual, sets, and paths
    ablation   what happens without bands of them, on other samples, condition by condition
    maps       what the top, a necessary and the bottom heads attend to on a few pictures

and for every model, on the domain with the longest prompts,

    acceleration   a few heads dense, the others local: accuracy, speed and cache, compared with other choices of heads

and for a model tuned from a language model that can still be opened,

    forms          which heads pictures and text share, before and after tuning, and how much they matter for both

These give ``summary.json`` (numbers and findings) and ``report.html``. A study that is killed continues where it
stopped when the same command is run again, and ends with the same numbers.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from mech import reference
from mech.arguments import NamedProgress
from mech.data.haystacks import DOMAINS, haystacks
from mech.data.jsonl import check_domain
from mech.data.pictures import pixel_digest, png, shows
from mech.data.samples import Samples, pictures_of
from mech.errors import ExperimentError, OutputError, UnsupportedModel
from mech.experiments.ablation.ablation import Condition, How, ablated
from mech.experiments.ablation.bank import reference_of
from mech.experiments.ablation.design import CLAIM, Design
from mech.experiments.ablation.forms import Scenes, forms_in
from mech.experiments.causal.report import CausalReport, causal_report
from mech.experiments.findings import acceleration, forms
from mech.experiments.findings.chosen import drawn, known_necessary, representative
from mech.experiments.findings.detectable import detectable
from mech.experiments.findings.pooled import pooled
from mech.experiments.findings.sentences import findings, headlines, scope
from mech.experiments.findings.summary import (
    above_null,
    summarise_agreement,
    summarise_domain,
    summarise_scales,
    summarise_scores,
)
from mech.experiments.findings.verdicts import verdicts
from mech.experiments.patching.blanked import paired_by_blanking
from mech.experiments.ranking.checks import refuse_overlap
from mech.experiments.ranking.ranking import Ranking, rank_heads
from mech.experiments.scores.gating import causal_head_gating
from mech.experiments.scores.measure import PUBLISHED, head_scores
from mech.experiments.scores.published import nulls
from mech.experiments.scores.ram import retrieval_attention_mass
from mech.experiments.scores.record import record_of
from mech.files import make_folder, write
from mech.model import HookedMLLM
from mech.results import Study, map_facts, provenance, write_json
from mech.scale import BlocksFailed, model_here, rest_goes_on, split_revision
from mech.settings import Settings, default_domains, default_settings
from mech.sparse.frontier.acceleration import Grid, local_for
from mech.sparse.frontier.resumable import acceleration_in
from mech.sparse.localize import localize

DEFAULT_MODELS = ("reference:llava-s", "reference:llava-m", "reference:qwen-s")
LONG = {"reference:qwen-long": 16}  # long-context models, and the number of pages they are accelerated on
GATES: dict[str, Any] = {"n_fits": 2, "steps": 12, "rate": 1.0}  # of causal head gating: few, large steps
RANKING = 0.375  # the share of samples that choose the dense heads; the others test them


def study(
    folder: str | Path = "study",
    models: Sequence[str] = DEFAULT_MODELS,
    domains: Sequence[str] | None = None,
    *,
    data: Samples | None = None,
    settings: Settings | None = None,
    progress: NamedProgress | None = None,
) -> Path:
    """Run a study, or what is missing of it, and write its report.

    Args:
        folder: where everything is saved.
        models: reference models, folders or hub ids; ``NAME@REVISION`` for a checkpoint of one.
        domains: haystack domains; by default those a reference model was trained for, otherwise all that the model
            takes.
        data: your own samples instead of the haystacks.
        settings: see ``Settings``; by default those of ``default_settings``.
        progress: called with (what, done, total).

    Returns:
        The path of ``report.html``.

    Raises:
        OutputError: the folder cannot be written, is in use, or holds a study with other settings or weights.
        ExperimentError: an unknown domain, two models of one name, or too few samples.
        BlocksFailed: inside ``mech.on_folder`` or ``mech.on_ray``, blocks failed; everything else is done.

    Cost: for each model and domain ``n_find`` forwards for the RAM, as many for the reference activations, three times
    as many for the other scores, ``n_test`` for every condition, and for each of ``n_causal`` samples about three for
    every head.
    """
    if data is None and settings is None and domains is None:
        domains = default_domains(models)
    settings = settings or default_settings(models)
    shorts = _folders(models)
    _refuse(domains, data)
    given = asdict(settings) | {"data": data.digest() if data is not None else None}
    with Study(folder, given) as results:
        summary: dict[str, Any] = {"schema": 1, "models": {}, "acceleration": {}}
        failed: list[BlocksFailed] = []
        for name, short in shorts.items():  # each model is released before the next one is opened
            studied = StudiedModel(results, model_here(name), short, settings, progress or _silent)
            _of_model(studied, summary, domains, data, failed)
            del studied
        if failed:
            raise BlocksFailed.of(failed)
        if not summary["models"]:
            raise ExperimentError("domain 'video' for models that take no video", "images", "add a Qwen-VL model")
        if settings.shares and tuple(models) == DEFAULT_MODELS and data is None:
            summary["acceleration"] |= _accelerated_long(results, domains, settings, progress or _silent)
        return _written(results, summary)


def _folders(models: Sequence[str]) -> dict[str, str]:
    """Models -> the names of their folders.

    Raises:
        ExperimentError: no models, an invalid name, or two models with the same folder.
    """
    for name in models:
        split_revision(name)  # refuses a bad name before anything is opened
    shorts = {name: short_name(name) for name in models}
    if len(set(shorts.values())) < len(models) or not models:
        raise ExperimentError(f"models {list(models)}", "at least one, each with its own name", "rename a folder")
    return shorts


def _refuse(domains: Sequence[str] | None, data: Samples | None) -> None:
    """Refuse unknown domains and samples without evidence."""
    for domain in domains or ():
        known = data.domains if data is not None else DOMAINS
        if domain not in known:
            raise ExperimentError.unknown("domain", domain, known)
    if lacking := [sample.id for sample in data or () if not sample.evidence]:
        what = f"{len(lacking)} samples have no evidence, the first is {lacking[0]!r}"
        raise ExperimentError(what, "samples that say where the evidence is", "set Sample(evidence=(mech.Box(...),))")


def _of_model(
    studied: "StudiedModel",
    summary: dict[str, Any],
    domains: Sequence[str] | None,
    data: Samples | None,
    failed: list[BlocksFailed],
) -> None:
    """Add one model to the summary: every domain, sparse inference, and pictures against text."""
    settings, model = studied.settings, studied.model
    wanted = studied.samples(domains, data)
    if not wanted:  # it takes no video, and nothing else was asked for
        return
    studied.record_weights()
    facts: dict[str, Any] = {"n_layers": model.cfg.n_layers, "n_heads": model.cfg.n_heads, "family": model.cfg.family}
    facts["domains"], rankings = {}, {}
    for place, (domain, samples) in enumerate(wanted.items()):
        here = replace(studied, settings=settings.of_domain(place))
        with rest_goes_on(failed):
            facts["domains"][domain], rankings[domain] = here.domain(domain, samples)
    facts["agreement"] = summarise_agreement(rankings) if rankings else {}
    summary["models"][studied.short] = facts
    if settings.shares:
        with rest_goes_on(failed):
            summary["acceleration"] |= studied.accelerated(longest(model, wanted, settings, own=data is not None))
    if settings.n_forms and data is None:
        with rest_goes_on(failed):
            facts |= studied.both_forms(next(iter(wanted)))


def _written(results: Study, summary: dict[str, Any]) -> Path:
    """Complete the summary across all models, and write it and the report."""
    from mech.views import report

    rams = {(s, d): results.get(f"{s}/{d}/ram") for s, facts in summary["models"].items() for d in facts["domains"]}
    retrieval: dict[str, dict[str, Ranking]] = {short: {} for short in summary["models"]}
    for (short, domain), ram in rams.items():
        retrieval[short][domain] = above_null(ram)
    summary["scales"] = summarise_scales(retrieval)
    summary["detectable"] = detectable(summary)
    summary["scope"] = scope(summary["models"])
    summary["findings"] = findings(summary)
    summary["headlines"] = headlines(summary["findings"])
    summary["verdicts"] = verdicts(summary)
    summary["pooled"] = pooled(summary, rams)
    records = {record["model"]: record["provenance"] for record in results.records}
    summary["provenance"] = {s: records[s] for s in dict.fromkeys([*summary["models"], *summary["acceleration"]])}
    write_json(summary, results.path / "summary.json")
    return report(results.path)


def _silent(what: str, done: int, total: int) -> None:
    """Report no progress."""


def short_name(name: str) -> str:
    """A model's name as a folder: ``reference:llava-m`` -> ``llava-m``, ``Qwen/Qwen3-VL`` -> ``Qwen--Qwen3-VL``.

    A local folder is named by its last part.
    """
    if name.startswith(reference.PREFIX):
        return name.removeprefix(reference.PREFIX)
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.is_dir() else name.strip("/").replace("/", "--")


@dataclass(frozen=True)
class StudiedModel:
    """One model in a study: what is measured on it, computed or found in the folder.

    Attributes:
        results: the study.
        model: a hooked model.
        short: the model's folder.
        settings: those of the study.
        say: called with (what, done, total).
    """

    results: Study
    model: HookedMLLM
    short: str
    settings: Settings
    say: NamedProgress

    def record_weights(self) -> None:
        """Record the model before its first result, and refuse to mix results of two checkpoints.

        Raises:
            OutputError: the folder holds results of other weights under this name.
        """
        record = provenance(self.model, seed=self.settings.seed)
        known = [entry["provenance"] for entry in self.results.records if entry.get("model") == self.short]
        if not known:
            self.results.record({"model": self.short, "provenance": record})
        elif known[0]["model"]["weights"] != record["model"]["weights"]:
            raise OutputError(
                f"{self.results.path} holds results of other weights of {self.short}",
                "one checkpoint for each name",
                "give another folder, or delete this one",
            )

    def samples(self, domains: Sequence[str] | None, data: Samples | None) -> dict[str, Samples]:
        """The samples of each domain: the user's, or haystacks; without video if the model takes none.

        Raises:
            ExperimentError: too few samples of a domain.
        """
        takes_video = self.model.processor.video_token is not None
        if data is not None:
            wanted = tuple(domains or data.domains)
            found = {domain: data.where(lambda sample, domain=domain: sample.domain == domain) for domain in wanted}
            for domain in wanted:
                if len(found[domain]) < 4:
                    raise ExperimentError(
                        f"{len(found[domain])} samples of domain {domain!r}", "at least four", "add samples"
                    )
                check_domain(domain)
            return {domain: of_it for domain, of_it in found.items() if takes_video or not next(iter(of_it)).video}
        name, n = str(self.model.name), self.settings.n_find + self.settings.n_test
        learnt = reference.card(split_revision(name)[0])["domains"] if name.startswith(reference.PREFIX) else DOMAINS
        wanted = tuple(domains or learnt)
        return {
            domain: haystacks(domain, n, self.settings.seed) for domain in wanted if takes_video or domain != "video"
        }

    def domain(self, domain: str, samples: Samples) -> tuple[dict[str, Any], Ranking]:
        """The results of one domain, and their summary."""
        results, settings, key = self.results, self.settings, f"{self.short}/{domain}"
        find, test = samples.split(settings.n_find / (settings.n_find + settings.n_test), settings.seed)
        refuse_overlap(test, [sample.id for sample in find], "found the heads")
        if not results.done(f"{key}/ram"):
            tell = partial(self.say, f"{key}: attention")
            ram = retrieval_attention_mass(self.model, find, batch_size=settings.batch_size, progress=tell)
            results.put(f"{key}/ram", ram)
        ram = results.get(f"{key}/ram")
        ranking = rank_heads(ram, domain=domain)
        scores = self.every_score(key, find)
        causal = self.causality(key, find, test, ranking) if settings.n_causal else None
        patched = results.get(f"{key}/causal") if results.done(f"{key}/causal") else None
        design = Design(**{field.name: getattr(settings, field.name) for field in fields(Design)})
        self.ablations(
            key, find, test, design.conditions(ranking, rank_heads(ram, "vision_mass"), known_necessary(patched))
        )
        shown = representative(find, ram, ranking.top(CLAIM), settings.n_maps)
        if not results.done(f"{key}/maps"):
            self.say(f"{key}: pictures", 0, 1)
            results.put(f"{key}/maps", drawn(self.model, shown, ranking, patched))
            self.say(f"{key}: pictures", 1, 1)
        keep_pictures(results, key, shown)
        facts = summarise_domain(ranking, ram, results.get(f"{key}/ablation")) | {"scores": scores}
        return facts | ({} if causal is None else {"causal": causal}), ranking

    def ablations(self, key: str, find: Samples, test: Samples, todo: list[Condition]) -> None:
        """Measure the missing conditions, and save each as soon as it is there.

        Methods after the first run only on the first ``n_other`` test samples; their other values are nan.
        """
        settings, missing = self.settings, self.results.missing(f"{key}/ablation", len(todo))
        done = count(len(todo) - len(missing) + 1)
        other = [i for i in missing if todo[i].method in settings.methods[1:]]
        options: dict[str, Any] = dict(batch_size=settings.batch_size, seed=settings.seed)
        how = How(reference_of(self.model, find, **options) if missing else None, seed=settings.seed)
        for some, samples in (([i for i in missing if i not in other], test), (other, test[: settings.n_other])):
            parts = ablated(self.model, samples, [todo[i] for i in some], how, settings.batch_size) if some else ()
            for index, part in zip(some, parts, strict=True):
                self.results.append(f"{key}/ablation", part.reindex(example=[sample.id for sample in test]), index)
                self.say(f"{key}: ablation", next(done), len(todo))
        if not self.results.done(f"{key}/ablation"):
            record = provenance(self.model, {"find": find, "test": test}, seed=settings.seed)
            facts: dict[str, Any] = dict(model=self.model.name, domain=key.rsplit("/", 1)[-1])
            facts |= dict(positions="all", phase="both")
            self.results.finish(f"{key}/ablation", len(todo), **facts, provenance=record)

    def every_score(self, key: str, find: Samples) -> dict[str, Any]:
        """How far the scores of the literature agree on one model and domain; the scores go to ``heads.json``."""
        results, settings = self.results, self.settings
        options: dict[str, Any] = dict(batch_size=settings.batch_size, seed=settings.seed)
        if not results.done(f"{key}/scores"):
            known = {name: score for name, score in PUBLISHED.items()
                     if score.calibrate != "distractors" or all(sample.distractors for sample in find)}  # fmt: skip
            known |= nulls(list(known), "even")
            options |= dict(progress=partial(self.say, f"{key}: scores"))
            try:
                found = head_scores(self.model, find, known, **options)
            except ExperimentError:  # a model that generates nothing has no generated rows
                spoken = {name: score for name, score in known.items() if score.queries != "generated"}
                found = head_scores(self.model, find, spoken, **options)
            results.put(f"{key}/scores", found)
        if settings.n_gating and not results.done(f"{key}/gating"):
            options |= dict(progress=partial(self.say, f"{key}: gates"))
            results.put(f"{key}/gating", causal_head_gating(self.model, find[: settings.n_gating], **GATES, **options))
        found, gated = results.get(f"{key}/scores"), results.get(f"{key}/gating") if settings.n_gating else None
        record_of(find, found, gated).to_json(results.file(f"{key}/scores").with_name("heads.json"))
        return summarise_scores(found, gated)

    def causality(self, key: str, find: Samples, test: Samples, ranking: Ranking) -> dict[str, Any]:
        """The causal report of one model on one domain, computed or found; the reason if there can be none.

        Samples without a counterfactual get one by blanking their evidence.
        """
        if not self.results.done(f"{key}/causal"):
            find, test = find[: self.settings.n_order], test[: self.settings.n_causal]
            blanked = not all(sample.counterfactual for sample in (*find, *test))
            try:
                if blanked:
                    find, test = paired_by_blanking(self.model, find), paired_by_blanking(self.model, test)
                found = causal_report(
                    self.model, test, ranking, find=find, method=None, n_random=2, seed=self.settings.seed,
                    batch_size=self.settings.batch_size, progress=lambda what, i, n: self.say(f"{key}: {what}", i, n),
                )  # fmt: skip
            except ExperimentError as error:  # the answers do not depend on the evidence, or the model cannot tell
                return {"reason": error.given}
            found.dataset.attrs["corruption"] = (
                "the evidence in the picture's mean colour" if blanked else "counterfactuals"
            )
            self.results.put(f"{key}/causal", found.dataset)
        return CausalReport(self.results.get(f"{key}/causal")).facts()

    def accelerated(self, samples: Samples) -> dict[str, Any]:
        """Sparse inference, computed or found; nothing if it cannot be tried."""
        settings, key = self.settings, f"{self.short}/acceleration"
        split = samples[: settings.n_long].split(RANKING, settings.seed)
        grid = Grid(settings.choices, settings.shares, settings.n_sets, settings.seed, settings.batch_size)
        try:
            local = local_for(self.model, split[1], gate_steps=24)
            localize(self.model, local.policy).close()
        except (ExperimentError, UnsupportedModel):  # prompts within the window; layers that share keys and values
            return {}
        found = acceleration_in(self.results, key, self.model, split, local, grid, self.say)
        return {self.short: acceleration.summarise(found)}

    def both_forms(self, domain: str) -> dict[str, Any]:
        """Heads on pictures and on text, computed or found; nothing for a model whose base cannot be opened."""
        settings, name = self.settings, str(self.model.name)
        if not name.startswith(reference.PREFIX) or "base" not in reference.revisions(name):
            return {}
        of = Scenes(domain, settings.n_forms, CLAIM, settings.n_sets, settings.seed, settings.batch_size)
        base = partial(model_here, f"{name}@base")
        found = forms_in(self.results, f"{self.short}/forms", self.model, base, of, self.say)
        return {"forms": forms.summarise(found)}


def longest(model: HookedMLLM, wanted: dict[str, Samples], settings: Settings, own: bool = False) -> Samples:
    """The samples of sparse inference: haystacks of many pages, or those of the domain with the longest prompts.

    The first sample of each domain decides which one that is. A user's ``own`` samples are used unchanged.
    """
    if settings.pages and not own:
        return haystacks("pages", settings.n_long, settings.seed, n_pictures=settings.pages)
    return max(wanted.values(), key=lambda samples: len(model.inputs_of(next(iter(samples))).layout))


def _accelerated_long(
    results: Study, domains: Sequence[str] | None, settings: Settings, say: NamedProgress
) -> dict[str, Any]:
    """Sparse inference of the installed long-context models, where a window matters most."""
    found: dict[str, Any] = {}
    smaller = replace(settings, batch_size=max(1, settings.batch_size // 4))
    for name, pages in LONG.items():
        if short_name(name) in reference.names() and (domains is None or "pages" in domains):
            studied = StudiedModel(results, model_here(name), short_name(name), smaller, say)
            studied.record_weights()
            found |= studied.accelerated(haystacks("pages", settings.n_long, settings.seed, n_pictures=pages))
    return found


def keep_pictures(results: Study, key: str, samples: Samples) -> None:
    """Write those pictures named in the maps of these samples that are missing or damaged."""
    folder = results.file(f"{key}/maps").parent
    make_folder(folder)
    for sample, facts in zip(samples, map_facts(results.get(f"{key}/maps")), strict=True):
        pace = -(-len(sample.video) // len(facts["pictures"])) or 1
        for file, picture in zip(facts["pictures"], pictures_of(sample, pace), strict=True):
            shown = picture.convert("RGB")
            if not shows(folder / file, pixel_digest(shown)):
                write(folder / file, png(shown))
