"""The explorer's answers: JSON in, JSON out, whatever carries it.

    engine = Engine(model, samples, reference)
    engine.ask({"action": "show", "state": "sample=3"})     # picture, question, answer, a map of heads
    engine.ask({"action": "change", "state": "sample=3&off=L0H2&way=zero"})

=========  ==========================================================================================================
``open``   the model, its samples as small pictures
``add``    a user's picture: ``data`` is a file in base64; the name returned is for the state's ``picture``
``show``   the pictures (pixels only of those not ``known``), question, evidence, answer, scores read off attention
``head``   where the state's head attends, for every word and as it answers
``change`` the answer without the state's heads
``random`` the probabilities of some ``tokens`` without the same number of random heads, ``RANDOM`` times
``score``  a score that is not read off attention: ``writes`` or ``effect``
``paths``  what the state's head reads, by edge attribution
``code``   Python that gives what is shown
=========  ==========================================================================================================

Errors that a user can fix come back as ``{"error": {"given", "expected", "do"}}``. The explorer only ever shows one
example: for tests over samples use ``mech study``.
"""

import base64
import binascii
import hashlib
import io
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image

from mech.data.pictures import decoded
from mech.data.samples import Sample, Samples, outlines, pictures_of
from mech.errors import InputError, MechError, printable, suggestion
from mech.experiments.attribution.edges import edge_attribution
from mech.experiments.attribution.logits import logit_attribution
from mech.experiments.metrics import LogitDiff
from mech.experiments.patching.activation import activation_patching
from mech.experiments.scores.sinks import definition_for
from mech.explorer.runs import Run
from mech.explorer.state import BIAS, BLANK, COUNTERFACTUAL, NEW_TOKENS, SEED, Origin, State, in_words
from mech.interventions import Ablate, Patch, Redirect, intervene, reference_activations
from mech.interventions.corruption import without_evidence
from mech.model import HookedMLLM
from mech.views.drawing.images import embedded

SHOWN = 5  # tokens, and the same number for a changed run
RANDOM = 5  # sets of random heads
PATHS = 12
KEPT = 4  # runs
PICTURES = 8  # the user's own
MOST_BYTES = 12_000_000  # per file
MOST_PIXELS = 24_000_000
THUMB = 88  # pixels
METHODS = ("mean", "resample")  # that need a reference


class Engine:
    """A model with samples, which answers one request at a time.

    Args:
        model: a hooked model.
        samples: the samples to choose from.
        reference: the samples behind ``mean`` and ``resample``, other than those that are shown.
        origin: how the generated code makes model and samples.
    """

    def __init__(self, model: HookedMLLM, samples: Samples, reference: Samples, origin: Origin | None = None):
        self.model, self.reference = model, reference
        self.samples: Sequence[Sample] = samples
        self.origin = origin or Origin()
        self.pictures: OrderedDict[str, Any] = OrderedDict()
        self._names: dict[str, str] = {}
        self._runs: OrderedDict[tuple, Any] = OrderedDict()
        self._activations: Any = None
        self._turn = threading.RLock()
        self._actions: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
            "open": self._open, "add": self._add, "show": self._show, "head": self._head, "change": self._change,
            "random": self._random, "score": self._score, "paths": self._paths, "code": self._code,
        }  # fmt: skip

    def ask(self, request: Any) -> dict[str, Any]:
        """The answer to one request, as plain data; a ``MechError`` is an answer too."""
        try:
            action = request.get("action") if isinstance(request, Mapping) else None
            if action not in self._actions:
                raise InputError(f"the action {action!r}", ", ".join(self._actions), "reload the page")
            with self._turn:
                return self._actions[action](request)
        except MechError as error:
            facts = {"given": error.given, "expected": error.expected, "do": error.do}
            return {"error": {name: printable(text) for name, text in facts.items()}}

    def warm(self) -> None:
        """Read the reference and the first sample now, so that the first click is as fast as the others."""
        with self._turn:
            self._reference()
            self._run(self._subject(State()))

    def code(self, state: State) -> str:
        """Python that gives what a state shows."""
        return state.as_python(replace(self.origin, pictures=dict(self._names)))

    # -- what is asked about ----------------------------------------------------------------------------------------

    def _state(self, request: Mapping[str, Any]) -> State:
        link = request.get("state", "")
        if not isinstance(link, str):
            raise InputError(f"a state of type {type(link).__name__}", "a text", "reload the page")
        state = State.read(link)
        if state.sample >= len(self.samples):
            raise InputError(f"sample {state.sample} of {len(self.samples)}", "a smaller number", "choose another")
        cfg = self.model.cfg
        if (head := state.head) and not (head[0] in cfg.attention_layers and head[1] < cfg.n_heads):
            raise InputError(f"the head {in_words([head])}", "a head of this model", "choose one on the map")
        return state

    def _subject(self, state: State) -> Sample:
        """The sample that a state means."""
        chosen = self.samples[state.sample]
        question = state.question or chosen.question
        if not state.picture:
            return replace(chosen, question=question, evidence=state.boxes or chosen.evidence)
        if state.picture not in self.pictures:
            raise InputError("a picture that is no longer here", "one that was dropped in this session",
                             "drop it again")  # fmt: skip
        return Sample(question, "", (self.pictures[state.picture],), evidence=state.boxes)

    def _second(self, state: State, sample: Sample) -> Sample:
        """The second picture, with the same question."""
        if state.other == BLANK:
            if not sample.evidence:
                raise InputError("the picture without its evidence, which is unknown", "a box over it",
                                 "draw one on the picture, or choose another second picture")  # fmt: skip
            return without_evidence(sample)
        if state.other == COUNTERFACTUAL:
            if sample.counterfactual is None:
                raise InputError("a second picture where there is none", "a sample with a counterfactual",
                                 "draw a box and choose 'without the evidence', or another sample")  # fmt: skip
            return replace(sample.counterfactual, question=sample.question)
        if int(state.other) >= len(self.samples):
            raise InputError(f"sample {state.other} of {len(self.samples)}", "a smaller number", "choose another")
        source = self.samples[int(state.other)]
        return replace(sample, images=source.images, video=source.video)

    def _run(self, sample: Sample) -> Run:
        """The run of a sample: read once, whatever is drawn on it."""
        key = (sample.question, sample.context, *(id(picture) for picture in (*sample.images, *sample.video)))
        if key not in self._runs:
            self._runs[key] = Run.of(self.model, sample)  # holds the pictures, so that their ids are not reused
            while len(self._runs) > KEPT:
                self._runs.popitem(last=False)
        self._runs.move_to_end(key)
        return self._runs[key]

    def _reference(self) -> Any:
        if self._activations is None:
            self._activations = reference_activations(self.model, self.reference)
        return self._activations

    def _spec(self, state: State, sample: Sample) -> Ablate | Patch | Redirect:
        """The change to the heads of a state."""
        if state.way == "patch":
            other = self._run(self._second(state, sample))
            self._run(sample).inputs.check_same_layout(other.inputs)
            return Patch("attn.hook_z", other.outputs, heads=state.off)
        if state.way == "pull":
            if not sample.evidence:
                raise InputError("no evidence to pull heads to", "a box", "draw one on the picture")
            return Redirect(state.off, to=sample.evidence, bias=BIAS)
        source = self._reference() if state.way in METHODS else None
        return Ablate(heads=state.off, to=state.way, reference=source, seed=SEED)

    # -- actions ----------------------------------------------------------------------------------------------------

    def _open(self, request: Mapping[str, Any]) -> dict[str, Any]:
        shown = []
        for sample in self.samples:
            seen = pictures_of(sample)
            shown.append({
                "question": sample.question, "thumb": _thumb(seen[0]) if seen else "",
                "counterfactual": sample.counterfactual is not None,
            })  # fmt: skip
        cfg = self.model.cfg
        kv = [cfg.kv_heads[layer] for layer in cfg.attention_layers]
        facts = {"layers": list(cfg.attention_layers), "heads": cfg.n_heads, "kv": kv}
        return {"model": repr(self.model), "name": self.model.name, **facts, "samples": shown}

    def _add(self, request: Mapping[str, Any]) -> dict[str, Any]:
        name = PurePath(str(request.get("name") or "picture.png").replace("\\", "/")).name[:120]
        try:
            raw = base64.b64decode(request.get("data") or "", validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise InputError(f"{name!r}, which arrived incomplete", "a file in base64", "drop it again") from error
        if len(raw) > MOST_BYTES:
            raise InputError(f"{name!r} of {len(raw):,} bytes", f"at most {MOST_BYTES:,}", "shrink the picture")
        picture = decoded(raw, name, most_pixels=MOST_PIXELS)
        digest = hashlib.sha256(raw).hexdigest()[:16]
        self.pictures[digest], self._names[digest] = picture, name
        while len(self.pictures) > PICTURES:
            gone, _ = self.pictures.popitem(last=False)
            del self._names[gone]
        return {"picture": digest, "name": name}

    def _show(self, request: Mapping[str, Any]) -> dict[str, Any]:
        state = self._state(request)
        sample = self._subject(state)
        run = self._run(sample)
        layout = run.inputs.layout.visual
        pace = layout.frames_per_token
        evidence = sample.evidence
        scores = {"vision_mass": run.score("vision_mass", ())}
        if evidence:
            scores |= {name: run.score(name, evidence) for name in ("ram", "gaze")}
        owner = (layout.frame // pace if sample.video else layout.image)[run.keys]
        return {
            "state": state.link(), "question": sample.question, "own": bool(state.question),
            "right": "" if state.picture or state.question else sample.answer,
            "file": self._names.get(state.picture, ""),
            "pictures": self._drawn(pictures_of(sample, pace), request.get("known")),
            "frame": pace if sample.video else 0,
            "evidence": outlines(sample, pace), "drawn": bool(state.boxes),
            "tokens": {"picture": owner.tolist(), "rect": _rounded(layout.rect[run.keys])},
            "sinks": [np.flatnonzero(row).tolist() for row in run.sinks], "sinks_by": definition_for(self.model),
            "words": list(run.words),
            "answer": run.answer, "top": run.top(SHOWN),
            "scores": {name: _rounded(value) for name, value in scores.items()},
            "even": run.even(evidence) if evidence else None,
            "counterfactual": sample.counterfactual is not None,
        }  # fmt: skip

    def _drawn(self, pictures: Sequence[Any], known: Any) -> list[dict[str, Any]]:
        """Pictures for the page; the pixels only of those that it does not have."""
        known = set(known) if isinstance(known, list) and all(isinstance(name, str) for name in known) else set()
        found = [embedded(picture) for picture in pictures]
        return [
            {"name": one.name, "width": one.width, "height": one.height, "uri": "" if one.name in known else one.uri}
            for one in found
        ]

    def _head(self, request: Mapping[str, Any]) -> dict[str, Any]:
        state = self._state(request)
        if state.head is None:
            raise InputError("no head", "one on the map", "click one")
        run = self._run(self._subject(state))
        rows = range(run.attention.shape[2])
        looking = {
            "words": [run.looking(*state.head, where) for where in run.words.values()],
            "question": run.looking(*state.head, rows[:-1]), "last": run.looking(*state.head, rows[-1:]),
        }  # fmt: skip
        return {name: _rounded(value) for name, value in looking.items()}

    def _change(self, request: Mapping[str, Any]) -> dict[str, Any]:
        state = self._state(request)
        sample = self._subject(state)
        if not state.off:
            raise InputError("no heads to change", "at least one", "click one and switch it off")
        run = self._run(sample)
        spec = self._spec(state, sample)
        says = run.under(spec)
        with intervene(self.model, spec) as changed:
            answer = changed.answer(run.inputs, max_new_tokens=NEW_TOKENS)
        # Tokens that were likely before are shown as well, however unlikely they are now.
        likely = {token: text for token, text, _ in (*run.top(SHOWN), *run.top(SHOWN, says))}
        told = [[token, text, run.probabilities[token].item(), says[token].item()] for token, text in likely.items()]
        return {"answer": answer, "tokens": told}

    def _random(self, request: Mapping[str, Any]) -> dict[str, Any]:
        state = self._state(request)
        sample = self._subject(state)
        run = self._run(sample)
        layers, heads = self.model.cfg.attention_layers, self.model.cfg.n_heads
        others = [(layer, head) for layer in layers for head in range(heads) if (layer, head) not in state.off]
        if not 0 < len(state.off) <= len(others):
            return {"sets": []}
        spec = self._spec(state, sample)
        rng = random.Random(f"{SEED}/{in_words(state.off)}")
        wanted, said = self._tokens(request.get("tokens", [])), int(run.probabilities.argmax())
        found = []
        for _ in range(RANDOM):
            drawn = rng.sample(others, len(state.off))
            says = run.under(replace(spec, heads=drawn))
            found.append({"heads": in_words(drawn), "same": int(says.argmax()) == said,
                          "p": {token: says[token].item() for token in wanted}})  # fmt: skip
        return {"sets": found}

    def _tokens(self, given: Any) -> list[int]:
        """Ids of tokens that a request asks about."""
        if not isinstance(given, list) or len(given) > 4 * SHOWN:
            raise InputError(f"tokens={given!r}", "a few ids", "reload the page")
        return [self.model.token_id(token) for token in given]

    def _score(self, request: Mapping[str, Any]) -> dict[str, Any]:
        name = request.get("name")
        if name not in ("writes", "effect"):
            raise InputError(f"the score {name!r}", "writes or effect", suggestion(str(name), ("writes", "effect")))
        state = self._state(request)
        sample = self._subject(state)
        run = self._run(sample)
        if name == "writes":
            (said, _, _), (next_best, _, _) = run.top(2)
            found = logit_attribution(self.model, run.inputs, LogitDiff(said, next_best))["heads"]
        else:
            other, metric = self._pair(state, sample)
            found = activation_patching(self.model, run.inputs, other.inputs, metric, point="attn.hook_z",
                                        over=("layer", "head"), direction="noise")["effect"]  # fmt: skip
        return {"score": _rounded(found.isel(example=0).sel(layer=list(self.model.cfg.attention_layers)).values)}

    def _pair(self, state: State, sample: Sample) -> tuple[Run, LogitDiff]:
        """The run on the second picture, and the metric: logit of this picture's answer minus that of the other's."""
        mine, other = self._run(sample), self._run(self._second(state, sample))
        said, theirs = mine.top(1)[0][0], other.top(1)[0][0]
        if said == theirs:
            raise InputError(
                f"two pictures to which the model gives the same answer ({mine.answer!r})", "two different answers",
                "choose another second picture",
            )  # fmt: skip
        mine.inputs.check_same_layout(other.inputs)
        return other, LogitDiff(said, theirs)

    def _paths(self, request: Mapping[str, Any]) -> dict[str, Any]:
        state = self._state(request)
        if state.head is None:
            raise InputError("no head", "one on the map", "click one")
        sample = self._subject(state)
        other, metric = self._pair(state, sample)
        layer, head = state.head
        shared = head * self.model.cfg.kv_heads[layer] // self.model.cfg.n_heads
        receivers = {f"L{layer}H{head}.q": "q", f"L{layer}K{shared}.k": "k", f"L{layer}K{shared}.v": "v"}
        found = edge_attribution(self.model, self._run(sample).inputs, other.inputs, metric, receivers=list(receivers),
                                 ig_steps=0, check=0, direction="noise")  # fmt: skip
        effect = found["effect"].isel(example=0)
        edges = [
            {"from": str(sender), "into": letter, "effect": float(effect.sel(sender=sender, receiver=name))}
            for sender in found["sender"].values
            for name, letter in receivers.items()
        ]
        there = [edge for edge in edges if edge["effect"] == edge["effect"]]
        return {"paths": sorted(there, key=lambda edge: -abs(edge["effect"]))[:PATHS]}

    def _code(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"code": self.code(self._state(request))}


def _thumb(picture: Image.Image) -> str:
    """A small copy of a picture, as a data URL."""
    small, written = picture.convert("RGB").copy(), io.BytesIO()
    small.thumbnail((THUMB, THUMB))
    small.save(written, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode()}"


def _rounded(values: Any) -> Any:
    """Arrays as lists of numbers with five digits, more than a colour can show; nan as null."""
    if isinstance(values, list):
        return [_rounded(one) for one in values]
    array = torch.as_tensor(values, dtype=torch.float64)
    if array.ndim:
        return [_rounded(one) for one in array]
    number = array.item()
    return float(f"{number:.5g}") if number == number else None
