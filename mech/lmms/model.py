"""The model that lmms-eval runs: a hooked model under a recipe. Only lmms-eval imports this file."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]

from mech.data.lmms_tasks import PLACE
from mech.data.samples import Sample
from mech.errors import InputError
from mech.experiments.metrics import answer_logits, quiz
from mech.interventions import intervene
from mech.lmms.recipe import Recipe, read_recipe
from mech.scale import open_model
from mech.sparse.localize import localize


class Mech(lmms):
    """A model with some heads ablated, or all but a few local.

    Args:
        pretrained: a reference model, a folder or a hub id.
        recipe: a file written by ``mech.lmms.write_recipe``; without one the model is unchanged.
        recipe_sha: the hash of the recipe in the file.
        device: where the model runs.
        batch_size: has no effect: requests run one by one.
        max_new_tokens: the limit for tasks that set none.

    Raises:
        OutputError: the file holds a recipe with another hash.
    """

    is_simple = True

    def __init__(
        self, pretrained: str, recipe: str = "", recipe_sha: str = "", device: str | None = None,
        batch_size: int | str = 1, max_new_tokens: int = 128, **_: Any,
    ):  # fmt: skip
        super().__init__()
        self._recipe = read_recipe(recipe, str(recipe_sha)) if recipe else Recipe()
        self._model = open_model(pretrained, **({"device": device} if device else {}))
        self._longest = int(max_new_tokens)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The model's answer to every request, cut off at the task's stop strings."""
        said = []
        with self._changed() as model:
            for request in requests:
                context, options, visuals, doc_id, task, split = request.args
                inputs = self._model.inputs_of(self._asked(context, visuals, doc_id, task, split))
                text = model.generate_text(inputs, max_new_tokens=int(options.get("max_new_tokens", self._longest)))[0]
                stops = options.get("until") or ()
                for stop in (stops,) if isinstance(stops, str) else stops:
                    text = text.split(stop)[0] if stop else text
                self.cache_hook.add_partial("generate_until", (context, options), text)
                said.append(text)
        return said

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log probability of every continuation, and whether greedy generation would begin with it."""
        found = []
        with self._changed() as model:
            for request in requests:
                context, target, visuals, doc_id, task, split = request.args
                text = str(target(self.task_dict[task][split][doc_id]) if callable(target) else target)
                asked = replace(self._asked(context, visuals, doc_id, task, split), answer=text.strip())
                questions = quiz(self._model, [asked], 1)
                with torch.no_grad():
                    (logits,) = answer_logits(model, questions)
                ids = torch.tensor(questions.answers[0])
                score = logits.log_softmax(-1).gather(1, ids[:, None]).sum()
                found.append((float(score), bool((logits.argmax(-1) == ids).all())))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused: answers of earlier rounds would have to be generated again under the recipe."""
        raise InputError(f"{len(requests)} requests of several rounds", "tasks of one round", "choose other tasks")

    @contextmanager
    def _changed(self) -> Iterator[Any]:
        """The model under the recipe."""
        if self._recipe.policy is not None:
            with localize(self._model, self._recipe.policy) as fast:
                yield fast
        elif self._recipe.ablate is not None:
            with intervene(self._model, self._recipe.ablate) as without:
                yield without
        else:
            yield self._model

    def _asked(self, context: str, visuals: Any, doc_id: int, task: str, split: str) -> Sample:
        shown = visuals(self.task_dict[task][split][doc_id])
        pictures = tuple(picture.convert("RGB") for picture in (shown if isinstance(shown, list | tuple) else [shown]))
        return Sample(PLACE.sub("", context).strip(), "", images=pictures)
