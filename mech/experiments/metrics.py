"""How well an answer is given: accuracy and logit difference, sample by sample.

Answers are *teacher-forced*: the right answer follows the prompt, and the model is asked at each of its tokens. The
answer is right when every token is the most likely one: when greedy generation would begin with it (without repetition
penalties), at the cost of a single forward. Whether the model would then stop is not asked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from mech.data.samples import Sample
from mech.errors import ExperimentError
from mech.inputs import Inputs
from mech.model import HookedMLLM


@dataclass(frozen=True)
class Quiz:
    """Samples made ready to be asked again and again: inputs with the answer, and the token each row should say.

    ``pictures`` is what the vision stack made of each batch's pictures: they are read once, however often the text
    stack is asked. ``wrong`` is the counterfactual's token at the first place where the two answers differ, -1 where
    there is none; ``forks`` is that place, counted from the answer's first token.
    """

    examples: tuple[str, ...]
    batches: tuple[Inputs, ...]
    pictures: tuple[dict[str, Any], ...]
    answers: tuple[tuple[int, ...], ...]
    forks: tuple[int, ...]
    wrong: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.answers)


def quiz(model: HookedMLLM, samples: Sequence[Sample], batch_size: int = 16) -> Quiz:
    """Build the inputs of ``samples`` with their answers, and read their pictures, once.

    Cost: the vision stack for every sample, and memory for its output.

    Raises:
        ExperimentError: an empty answer.
    """
    rows, answers, forks, wrong = [], [], [], []
    for sample in samples:
        if not sample.answer.strip():
            raise ExperimentError(f"sample {sample.id!r} has no answer", "a text to compare with", "set Sample.answer")
        row = model.inputs_of(sample, answer=True).to("cpu")
        said = _answer_ids(row)
        fork, other = 0, -1
        if sample.counterfactual is not None:
            theirs = model.processor.answer_ids(sample.counterfactual.answer)
            differing = [i for i, (a, b) in enumerate(zip(said, theirs, strict=False)) if a != b]
            if differing:
                fork, other = differing[0], theirs[differing[0]]
        rows.append(row)
        answers.append(said)
        forks.append(fork)
        wrong.append(other)
    joined = [model.collate(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    batches, pictures = zip(*map(model.encode_pictures, joined), strict=True)
    examples = tuple(sample.id or str(i) for i, sample in enumerate(samples))
    return Quiz(examples, batches, pictures, tuple(answers), tuple(forks), tuple(wrong))


@torch.no_grad()
def ask(forward: Callable[..., Float[torch.Tensor, "batch pos vocab"]], questions: Quiz) -> dict[str, np.ndarray]:
    """``accuracy`` (0 or 1) and ``logit_diff`` (right minus wrong answer, in logits; nan without one) per sample.

    ``forward`` is a model, or one under intervention. Cost: one forward of the text stack per sample; only the
    answer's rows are unembedded.
    """
    accuracy, difference = [], []
    row = 0
    for batch, pictures in zip(questions.batches, questions.pictures, strict=True):
        answers = questions.answers[row : row + len(batch)]
        keep = max(map(len, answers)) + 1
        logits = forward(batch, logits_to_keep=keep, mm_encoder_outputs=dict(pictures)).float().cpu()
        for i, answer in enumerate(answers):
            # Rows end with the answer; the token at place j is predicted one row earlier.
            says = logits[i, keep - len(answer) - 1 : keep - 1]
            accuracy.append(float(says.argmax(-1).tolist() == list(answer)))
            at, wrong = questions.forks[row + i], questions.wrong[row + i]
            difference.append(float(says[at, answer[at]] - says[at, wrong]) if wrong >= 0 else float("nan"))
        row += len(batch)
    return {"accuracy": np.array(accuracy), "logit_diff": np.array(difference)}


def _answer_ids(row: Inputs) -> tuple[int, ...]:
    ids = row.tensors["input_ids"][0]
    return tuple(int(ids[position]) for position in row.layout.spans["answer"])
