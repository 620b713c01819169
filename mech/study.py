"""The main job, end to end: which heads retrieve the evidence, are they needed, how sure is that.

For every model and domain a study makes five results and saves each as soon as it is there:

    ram        RAM of every head, on the samples that find heads
    scores     the scores of the literature, on the samples that find heads: do they name the same ones?
    causal     does attention imply causal effect: every head patched from the counterfactual, sets, and paths
    ablation   what happens without bands of them, on other samples, condition by condition
    maps       what the top, a necessary and the bottom heads attend to on a few pictures, for the eye

and for every model, on the domain with the longest prompts,

    acceleration   a few heads dense, the others local: accuracy, speed and cache, beside other choices of heads

and for a model that was tuned from a language model which can still be opened,

    forms          which heads pictures and text share, before and after tuning, and what they are worth for both

From those come ``summary.json`` (numbers and findings) and ``report.html``. A study that is killed goes on where it
was when the same command is given again, and ends in the same numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import xarray as xr

from mech import reference
from mech.data.haystacks import DOMAINS, haystacks
from mech.data.jsonl import check_domain
from mech.data.pictures import pixel_digest, png, shows
from mech.data.samples import Samples, pictures_of
from mech.errors import ExperimentError, OutputError, UnsupportedModel, suggestion
from mech.experiments.ablation.ablation import Condition, How, ablated
from mech.experiments.ablation.design import CLAIM, Design
from mech.experiments.ablation.forms import forms_in
from mech.experiments.attention.maps import attention_maps
from mech.experiments.causal.report import CausalReport, causal_report
from mech.experiments.findings import acceleration, forms
from mech.experiments.findings.chosen import known_necessary, necessary_blind, representative
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
from mech.experiments.patching.deciding import deciding_queries
from mech.experiments.ranking.checks import refuse_overlap
from mech.experiments.ranking.ranking import Ranking, rank_heads
from mech.experiments.scores.measure import PUBLISHED, head_scores
from mech.experiments.scores.ram import retrieval_attention_mass
from mech.files import make_folder, write
from mech.interventions import reference_activations
from mech.interventions.counterfactuals import with_counterfactuals
from mech.model import HookedMLLM
from mech.results import Study, map_facts, provenance, write_json
from mech.scale import BlocksFailed, open_model, rest_goes_on, split_revision
from mech.settings import Settings, default_domains, default_settings
from mech.sparse.frontier.acceleration import local_for
from mech.sparse.frontier.resumable import acceleration_in
from mech.sparse.localize import localize

Progress = Callable[[str, int, int], None]
SHOWN = 4  # heads of each band that are drawn over the pictures
DEFAULT_MODELS = ("reference:llava-s", "reference:llava-m", "reference:qwen-s")
LONG = {"reference:qwen-long": 16}  # models of long contexts, and the pages they are accelerated on
RANKING = 0.375  # of the samples choose the dense heads, the others test them


def study(
    folder: str | Path = "study",
    models: Sequence[str] = DEFAULT_MODELS,
    domains: Sequence[str] | None = None,
    *,
    data: Samples | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Path:
    """Run a study, or what is missing of it, and write its report.

    Args:
        folder: where everything is saved.
        models: reference models, folders or hub ids; ``NAME@REVISION`` for a checkpoint of one.
        domains: haystack domains; by default those a reference model was trained for, all that take images otherwise.
        data: samples of your own in place of the haystacks.
        settings: see ``Settings``; by default those of ``default_settings``.
        progress: called with (what, done, in all).

    Returns:
        The path of ``report.html``.

    Raises:
        OutputError: the folder cannot be written, is in use, or holds a study of other settings or weights.
        ExperimentError: an unknown domain, two models of one name, or too few samples.
        BlocksFailed: inside ``mech.on_folder`` or ``mech.on_ray``, blocks failed; everything else is done.

    Cost: for each model and domain ``n_find`` forwards for the RAM, as many for the reference activations, three times
    as many for the other scores, ``n_test`` for every condition, and for each of ``n_causal`` samples about three for
    every head.
    """
    from mech.views import report

    if data is None and settings is None and domains is None:
        domains = default_domains(models)
    settings = settings or default_settings(models)
    say = progress or (lambda what, done, total: None)
    for name in models:
        split_revision(name)  # refuses a bad one before anything is opened
    shorts = {name: short_name(name) for name in models}
    if len(set(shorts.values())) < len(models) or not models:
        raise ExperimentError(f"models {list(models)}", "at least one, each with a name of its own", "rename a folder")
    for domain in domains or ():
        known = data.domains if data is not None else DOMAINS
        if domain not in known:
            raise ExperimentError(f"no domain is called {domain!r}", ", ".join(known), suggestion(domain, known))
    if lone := [sample.id for sample in data or () if not sample.evidence]:
        what = f"{len(lone)} samples have no evidence, the first is {lone[0]!r}"
        raise ExperimentError(what, "samples that say where the evidence is", "set Sample(evidence=(mech.Box(...),))")
    given = asdict(settings) | {"data": data.digest() if data is not None else None}
    with Study(folder, given) as place:
        summary: dict[str, Any] = {"schema": 1, "models": {}, "acceleration": {}}
        retrieval: dict[str, dict[str, Ranking]] = {}
        failed: list[BlocksFailed] = []
        for name, short in shorts.items():
            model = open_model(name)
            wanted = samples_of(model, name, domains, data, settings)
            if not wanted:  # it takes no video, and nothing else was asked for
                continue
            same_weights(place, model, short)
            facts: dict[str, Any] = {
                "n_layers": model.cfg.n_layers,
                "n_heads": model.cfg.n_heads,
                "family": model.cfg.family,
                "domains": {},
            }
            rankings: dict[str, Ranking] = {}
            for domain, samples in wanted.items():
                with rest_goes_on(failed):
                    found = one_domain(place, model, f"{short}/{domain}", samples, settings, say)
                    facts["domains"][domain], rankings[domain] = found
            facts["agreement"] = summarise_agreement(rankings) if rankings else {}
            summary["models"][short] = facts
            retrieval[short] = {domain: above_null(place.get(f"{short}/{domain}/ram")) for domain in rankings}
            if settings.shares:
                with rest_goes_on(failed):
                    long = longest(model, wanted, settings, own=data is not None)
                    summary["acceleration"] |= accelerated(place, model, short, long, settings, say)
            if settings.n_forms and data is None:
                with rest_goes_on(failed):
                    facts |= both_forms(place, model, short, next(iter(wanted)), settings, say)
            del model  # before the next one is loaded
        if failed:
            raise BlocksFailed.of(failed)
        if not summary["models"]:
            raise ExperimentError("domain 'video' for models that take none", "images", "add a Qwen-VL model")
        if settings.shares and tuple(models) == DEFAULT_MODELS and data is None:
            summary["acceleration"] |= accelerated_long(place, domains, settings, say)
        summary["scales"] = summarise_scales(retrieval)
        summary["detectable"] = detectable(summary)
        summary["scope"] = scope(summary["models"])
        summary["findings"] = findings(summary)
        summary["headlines"] = headlines(summary["findings"])
        summary["verdicts"] = verdicts(summary)
        rams = {(s, d): place.get(f"{s}/{d}/ram") for s, facts in summary["models"].items() for d in facts["domains"]}
        summary["pooled"] = pooled(summary, rams)
        records = {record["model"]: record["provenance"] for record in place.records}
        summary["provenance"] = {s: records[s] for s in dict.fromkeys([*summary["models"], *summary["acceleration"]])}
        write_json(summary, place.path / "summary.json")
        return report(place.path)


def short_name(name: str) -> str:
    """A model's name as a folder: ``reference:llava-m`` -> ``llava-m``, ``Qwen/Qwen3-VL`` -> ``Qwen--Qwen3-VL``.

    A local folder is known by its last part.
    """
    if name.startswith(reference.PREFIX):
        return name.removeprefix(reference.PREFIX)
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.is_dir() else name.strip("/").replace("/", "--")


def same_weights(place: Study, model: HookedMLLM, short: str) -> None:
    """Record the model before its first result, and refuse to mix results of two checkpoints.

    Raises:
        OutputError: the folder holds results of other weights under this name.
    """
    record = provenance(model, seed=place.settings.get("seed"))
    known = [entry["provenance"] for entry in place.records if entry.get("model") == short]
    if not known:
        place.record({"model": short, "provenance": record})
    elif known[0]["model"]["weights"] != record["model"]["weights"]:
        raise OutputError(
            f"{place.path} holds results of other weights of {short}",
            "one checkpoint for each name",
            "give another folder, or delete this one",
        )


def samples_of(
    model: HookedMLLM, name: str, domains: Sequence[str] | None, data: Samples | None, settings: Settings
) -> dict[str, Samples]:
    """The samples of each domain: the user's, or haystacks; without video where the model takes none.

    Raises:
        ExperimentError: too few samples of a domain.
    """
    takes_video = model.processor.video_token is not None
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
    learnt = reference.card(split_revision(name)[0])["domains"] if name.startswith(reference.PREFIX) else DOMAINS
    wanted = tuple(domains or learnt)
    n = settings.n_find + settings.n_test
    return {domain: haystacks(domain, n, settings.seed) for domain in wanted if takes_video or domain != "video"}


def one_domain(
    place: Study, model: HookedMLLM, key: str, samples: Samples, settings: Settings, say: Progress
) -> tuple[dict[str, Any], Ranking]:
    """The results of one model on one domain, computed or found, and their summary."""
    find, test = samples.split(settings.n_find / (settings.n_find + settings.n_test), settings.seed)
    refuse_overlap(test, [sample.id for sample in find], "found the heads")
    if not place.done(f"{key}/ram"):
        scores = retrieval_attention_mass(
            model, find, batch_size=settings.batch_size, progress=lambda i, n: say(f"{key}: attention", i, n)
        )
        place.put(f"{key}/ram", scores)
    ram = place.get(f"{key}/ram")
    ranking = rank_heads(ram, domain=key.rsplit("/", 1)[-1])
    scores = every_score(place, model, key, find, settings, say)
    causal = causality(place, model, key, find, test, ranking, settings, say) if settings.n_causal else None
    patched = place.get(f"{key}/causal") if place.done(f"{key}/causal") else None
    design = Design(**{field.name: getattr(settings, field.name) for field in fields(Design)})
    todo = design.conditions(ranking, rank_heads(ram, "vision_mass"), known_necessary(patched))
    ablations(place, model, key, find, test, todo, settings, say)
    shown = representative(find, ram, ranking.top(CLAIM), settings.n_maps)
    if not place.done(f"{key}/maps"):
        say(f"{key}: pictures", 0, 1)
        place.put(f"{key}/maps", maps_of(model, shown, ranking, patched))
        say(f"{key}: pictures", 1, 1)
    keep_pictures(place, key, shown)
    facts = summarise_domain(ranking, ram, place.get(f"{key}/ablation")) | {"scores": scores}
    return facts | ({} if causal is None else {"causal": causal}), ranking


def ablations(
    place: Study,
    model: HookedMLLM,
    key: str,
    find: Samples,
    test: Samples,
    todo: list[Condition],
    settings: Settings,
    say: Progress,
) -> None:
    """Measure the conditions that are missing, and save each as soon as it is there.

    Methods after the first are asked of the first ``n_other`` test samples; what they were not asked is nan.
    """
    missing = place.missing(f"{key}/ablation", len(todo))
    done = count(len(todo) - len(missing) + 1)
    other = [i for i in missing if todo[i].method in settings.methods[1:]]
    bank = reference_activations(model, find, batch_size=settings.batch_size, seed=settings.seed) if missing else None
    how = How(bank, seed=settings.seed)
    for some, samples in (([i for i in missing if i not in other], test), (other, test[: settings.n_other])):
        parts = ablated(model, samples, [todo[i] for i in some], how, settings.batch_size) if some else ()
        for index, part in zip(some, parts, strict=True):
            place.append(f"{key}/ablation", part.reindex(example=[sample.id for sample in test]), index)
            say(f"{key}: ablation", next(done), len(todo))
    if not place.done(f"{key}/ablation"):
        record = provenance(model, {"find": find, "test": test}, seed=settings.seed)
        facts: dict[str, Any] = dict(model=model.name, domain=key.rsplit("/", 1)[-1], positions="all", phase="both")
        place.finish(f"{key}/ablation", len(todo), **facts, provenance=record)


def every_score(
    place: Study, model: HookedMLLM, key: str, find: Samples, settings: Settings, say: Progress
) -> dict[str, Any]:
    """How far the scores of the literature agree on one model and domain, computed or found."""
    if not place.done(f"{key}/scores"):
        options: dict[str, Any] = dict(
            batch_size=settings.batch_size, seed=settings.seed, progress=partial(say, f"{key}: scores")
        )
        known = {name: score for name, score in PUBLISHED.items()
                 if score.calibrate != "distractors" or all(sample.distractors for sample in find)}  # fmt: skip
        try:
            found = head_scores(model, find, tuple(known), **options)
        except ExperimentError:  # a model that says nothing has no rows of what it says
            spoken = [name for name, score in known.items() if score.queries != "generated"]
            found = head_scores(model, find, spoken, **options)
        place.put(f"{key}/scores", found)
    return summarise_scores(place.get(f"{key}/scores"))


def causality(
    place: Study,
    model: HookedMLLM,
    key: str,
    find: Samples,
    test: Samples,
    ranking: Ranking,
    settings: Settings,
    say: Progress,
) -> dict[str, Any]:
    """The causal report of one model on one domain, computed or found; the reason where there can be none.

    Samples without a counterfactual get one by blanking their evidence.
    """
    if not place.done(f"{key}/causal"):
        find, test = find[: settings.n_order], test[: settings.n_causal]
        blanked = not all(sample.counterfactual for sample in (*find, *test))
        try:
            if blanked:
                find, test = with_counterfactuals(model, find), with_counterfactuals(model, test)
            found = causal_report(
                model, test, ranking, find=find, method=None, n_random=2, seed=settings.seed,
                batch_size=settings.batch_size, progress=lambda what, i, n: say(f"{key}: {what}", i, n),
            )  # fmt: skip
        except ExperimentError as error:  # the answers do not hang on the evidence, or the model cannot tell
            return {"reason": error.given}
        found.dataset.attrs["corruption"] = (
            "the evidence in the picture's mean colour" if blanked else "counterfactuals"
        )
        place.put(f"{key}/causal", found.dataset)
    return CausalReport(place.get(f"{key}/causal")).facts()


def longest(model: HookedMLLM, wanted: dict[str, Samples], settings: Settings, own: bool = False) -> Samples:
    """The samples of sparse inference: so many pages, or those of the domain with the longest prompts.

    Which domain that is is told by the first sample of each. A user's ``own`` samples stay as they are.
    """
    if settings.pages and not own:
        return haystacks("pages", settings.n_long, settings.seed, n_pictures=settings.pages)
    return max(wanted.values(), key=lambda samples: len(model.inputs_of(next(iter(samples))).layout))


def accelerated(
    place: Study, model: HookedMLLM, short: str, samples: Samples, settings: Settings, say: Progress
) -> dict[str, Any]:
    """Sparse inference of one model, computed or found; nothing where it cannot be tried."""
    find, test = samples[: settings.n_long].split(RANKING, settings.seed)
    options: dict[str, Any] = dict(
        shares=settings.shares, choices=settings.choices, n_random=settings.n_sets, batch_size=settings.batch_size,
        seed=settings.seed, say=say,
    )  # fmt: skip
    try:
        local = local_for(model, test, gate_steps=24)
        localize(model, local.policy).close()
    except (ExperimentError, UnsupportedModel):  # prompts within the window; layers that share keys and values
        return {}
    found = acceleration_in(place, f"{short}/acceleration", model, find, test, local, **options)
    return {short: acceleration.summarise(found)}


def accelerated_long(place: Study, domains: Sequence[str] | None, settings: Settings, say: Progress) -> dict[str, Any]:
    """Sparse inference of the models of long contexts that are installed, where a window matters most."""
    found: dict[str, Any] = {}
    for name, pages in LONG.items():
        if short_name(name) in reference.names() and (domains is None or "pages" in domains):
            model = HookedMLLM.from_pretrained(name)
            same_weights(place, model, short_name(name))
            samples = haystacks("pages", settings.n_long, settings.seed, n_pictures=pages)
            smaller = replace(settings, batch_size=max(1, settings.batch_size // 4))
            found |= accelerated(place, model, short_name(name), samples, smaller, say)
    return found


def both_forms(
    place: Study, model: HookedMLLM, short: str, domain: str, settings: Settings, say: Progress
) -> dict[str, Any]:
    """Heads on pictures and on text, computed or found; nothing for a model without the one that it was tuned from."""
    name = str(model.name)
    if not name.startswith(reference.PREFIX) or "base" not in reference.revisions(name):
        return {}
    found = forms_in(
        place, f"{short}/forms", model, lambda: open_model(f"{name}@base"), domain, settings.n_forms, k=CLAIM,
        n_random=settings.n_sets, seed=settings.seed, batch_size=settings.batch_size, say=say,
    )  # fmt: skip
    return {"forms": forms.summarise(found)}


def maps_of(model: HookedMLLM, samples: Samples, ranking: Ranking, patched: xr.Dataset | None) -> xr.Dataset:
    """What the first and the last heads of a ranking attend to in some samples.

    Where patching was possible also necessary heads that do not attend to the evidence, each from the query at which it
    decides.
    """
    bands = {
        "top": ranking.top(SHOWN),
        "necessary": necessary_blind(patched, SHOWN // 2),
        "bottom": ranking.bottom(SHOWN // 2),
    }
    bands = {name: heads for name, heads in bands.items() if heads}
    heads = [head for band in bands.values() for head in band]
    try:
        deciding = [deciding_queries(model, sample, heads) for sample in samples]
    except ExperimentError:  # no counterfactuals: nothing says where a head decides
        deciding = None
    return attention_maps(model, samples, ranking, bands=bands, deciding=deciding)


def keep_pictures(place: Study, key: str, samples: Samples) -> None:
    """Write the pictures that the maps of these samples name, those that are missing or damaged."""
    folder = place.file(f"{key}/maps").parent
    make_folder(folder)
    for sample, facts in zip(samples, map_facts(place.get(f"{key}/maps")), strict=True):
        pace = -(-len(sample.video) // len(facts["pictures"])) or 1
        for file, picture in zip(facts["pictures"], pictures_of(sample, pace), strict=True):
            shown = picture.convert("RGB")
            if not shows(folder / file, pixel_digest(shown)):
                write(folder / file, png(shown))
