"""How well the model answers: accuracy and logit difference, sample by sample; and the metrics for patching.

Answers are *teacher-forced*: the right answer follows the prompt, and the model's prediction is read at each of its
tokens. The answer is right when every token is the most likely one, that is, when greedy generation would begin with it
(without repetition penalties), at the cost of a single forward. Whether the model would then stop is not measured.

Patching takes a ``Metric``: ``LogitDiff("seven", "two")``, ``LogProb``, ``Probability``, ``Rank``, ``KL()``, or a
function of your own (``OfLogits``). A metric says which positions it reads, so that only their logits are computed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float

from mech import arguments
from mech.arguments import checked, short
from mech.data.samples import Sample
from mech.errors import ExperimentError, InputError
from mech.inputs import Inputs, TokenLayout
from mech.model import HookedMLLM
from mech.model.partial.beginning import MOST, Beginning, beginning


@dataclass(frozen=True)
class Quiz:
    """Samples prepared for repeated runs: inputs with the answer, and the tokens each row should predict.

    ``pictures`` is the vision stack's output for each batch: pictures are encoded once, however often the text stack
    runs. ``wrong`` is the counterfactual's token at the first place where the two answers differ, -1 if there is none;
    ``forks`` is that place, counted from the answer's first token.
    """

    examples: tuple[str, ...]
    batches: tuple[Inputs, ...]
    pictures: tuple[dict[str, Any], ...]
    answers: tuple[tuple[int, ...], ...]
    forks: tuple[int, ...]
    wrong: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.answers)

    def batch(self, index: int) -> "Quiz":
        """One batch as a separate quiz."""
        start = sum(map(len, self.batches[:index]))
        rows = slice(start, start + len(self.batches[index]))
        return Quiz(
            self.examples[rows],
            self.batches[index : index + 1],
            self.pictures[index : index + 1],
            self.answers[rows],
            self.forks[rows],
            self.wrong[rows],
        )


def quiz(
    model: HookedMLLM,
    samples: Sequence[Sample],
    batch_size: int = 16,
    check: Callable[[Inputs], None] = lambda batch: None,
) -> Quiz:
    """Build the inputs of ``samples`` with their answers, and encode their pictures once.

    ``check`` may refuse a batch before anything is run.

    Cost: the vision stack for every sample, and memory for its output.

    Raises:
        ExperimentError: an empty answer.
    """
    rows, answers, forks, wrong = [], [], [], []
    for sample in samples:
        if not sample.answer.strip():
            raise ExperimentError(
                f"sample {sample.id!r} has no answer", "a string to compare with", "set Sample.answer"
            )
        row = model.inputs_of(sample, answer=True).to("cpu")
        answer_ids = _answer_ids(row)
        fork, other = 0, -1
        if sample.counterfactual is not None:
            theirs = model.processor.answer_ids(sample.counterfactual.answer)
            differing = [i for i, (a, b) in enumerate(zip(answer_ids, theirs, strict=False)) if a != b]
            if differing:
                fork, other = differing[0], theirs[differing[0]]
        rows.append(row)
        answers.append(answer_ids)
        forks.append(fork)
        wrong.append(other)
    joined = [model.collate(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    for batch in joined:
        check(batch)
    batches, pictures = zip(*map(model.encode_pictures, joined), strict=True)
    examples = tuple(sample.id or str(i) for i, sample in enumerate(samples))
    return Quiz(examples, batches, pictures, tuple(answers), tuple(forks), tuple(wrong))


def begun(model: HookedMLLM, questions: Quiz) -> tuple[Beginning, ...]:
    """The runs of the questions, kept so that ``ask`` can begin at a later layer, batch by batch.

    Cost: one and a half forwards of the text stack for each sample, and memory for the streams.
    """
    most = MOST // max(1, len(questions.batches))
    return tuple(
        beginning(model, batch, most=most, logits_to_keep=keep, mm_encoder_outputs=dict(pictures))
        for batch, keep, pictures in zip(questions.batches, _kept(questions), questions.pictures, strict=True)
    )


@torch.no_grad()
def ask(
    forward: Callable[..., Float[torch.Tensor, "batch pos vocab"]],
    questions: Quiz,
    runs: Sequence[Beginning] = (),
    layer: int = 0,
) -> dict[str, np.ndarray]:
    """``accuracy`` (0 or 1) and ``logit_diff`` (right minus wrong answer, in logits; nan without one) per sample.

    ``forward`` is a model, or one under intervention. With ``runs`` (from ``begun``) it begins at ``layer``, before
    which nothing may be changed. Cost: one forward of the text stack per sample, or the part from ``layer`` on; only
    the answer's rows are unembedded.
    """
    accuracy, difference = [], []
    for row, says in enumerate(answer_logits(forward, questions, runs, layer)):
        answer, at, wrong = questions.answers[row], questions.forks[row], questions.wrong[row]
        accuracy.append(float(says.argmax(-1).tolist() == list(answer)))
        difference.append(float(says[at, answer[at]] - says[at, wrong]) if wrong >= 0 else float("nan"))
    return {"accuracy": np.array(accuracy), "logit_diff": np.array(difference)}


@torch.no_grad()
def later_tokens(
    forward: Callable[..., Float[torch.Tensor, "batch pos vocab"]], questions: Quiz
) -> Float[np.ndarray, " example"]:
    """The share of right tokens after the answer's first; nan for answers of one token.

    The first is predicted at the prompt's last position, the later ones in decoding. Cost: that of ``ask``.
    """
    found = []
    for says, answer in zip(answer_logits(forward, questions), questions.answers, strict=True):
        right = says.argmax(-1)[1:] == torch.tensor(answer[1:])
        found.append(float(right.float().mean()) if len(answer) > 1 else float("nan"))
    return np.array(found)


def answer_logits(
    forward: Callable[..., Float[torch.Tensor, "batch pos vocab"]],
    questions: Quiz,
    runs: Sequence[Beginning] = (),
    layer: int = 0,
) -> Iterator[Float[torch.Tensor, "token vocab"]]:
    """The logits that predict each token of each sample's answer, sample by sample; see ``ask``."""
    row = 0
    for index, (batch, keep) in enumerate(zip(questions.batches, _kept(questions), strict=True)):
        answers = questions.answers[row : row + len(batch)]
        with runs[index].at(layer) if runs else nullcontext():
            logits = forward(batch, logits_to_keep=keep, mm_encoder_outputs=dict(questions.pictures[index]))
        for logit_row, answer in zip(logits.float().cpu(), answers, strict=True):
            # Rows end with the answer; the token at place j is predicted one row earlier.
            yield logit_row[keep - len(answer) - 1 : keep - 1]
        row += len(batch)


def _kept(questions: Quiz) -> Iterator[int]:
    """How many rows of each batch are unembedded: those of its longest answer, and the one before."""
    row = 0
    for batch in questions.batches:
        yield max(map(len, questions.answers[row : row + len(batch)])) + 1
        row += len(batch)


def _answer_ids(row: Inputs) -> tuple[int, ...]:
    ids = row.tensors["input_ids"][0]
    return tuple(int(ids[position]) for position in row.layout.spans["answer"])


@dataclass(frozen=True)
class Reading:
    """A metric prepared for one example: the positions whose logits it reads, and how it scores them.

    ``score`` takes the logits of any number of variants and those of the clean run, all at ``positions``.
    """

    positions: tuple[int, ...]
    score: Callable[
        [Float[torch.Tensor, "variant read vocab"], Float[torch.Tensor, "read vocab"]], Float[torch.Tensor, " variant"]
    ]


class Metric(ABC):
    """A number for each example, from the logits of a few positions. Answers are texts, token ids, or one per example.

    Answers of several tokens are teacher-forced: build the inputs with the answer (``inputs_of(sample, answer=True)``).
    """

    unit: ClassVar[str]

    def __call__(
        self,
        logits: Float[torch.Tensor, "batch pos vocab"],
        clean: Float[torch.Tensor, "batch pos vocab"] | None = None,
        model: HookedMLLM | None = None,
    ) -> Float[torch.Tensor, " batch"]:
        """The metric of each row, read from logits at the last position, as in TransformerLens' patching.

        Args:
            logits: of rows that end where the answer begins (padded on the left).
            clean: those of the clean run, for a metric that compares with it (``KL``).
            model: needed for its tokenizer if answers are texts.

        Raises:
            ExperimentError: texts without a model, an answer that differs only at a later token, or no clean run.
        """
        if not isinstance(logits, torch.Tensor) or logits.ndim != 3:
            raise ExperimentError(f"{type(self).__name__} of {type(logits).__name__}", "logits [batch pos vocab]")
        if clean is None and isinstance(self, KL):
            raise ExperimentError("KL of one run's logits", "those of the clean run too", "give clean=clean_logits")
        before = logits if clean is None else clean
        read = [self.reading(model, _LAST, example) for example in range(len(logits))]  # type: ignore[arg-type]
        scores = [reading.score(logits[i : i + 1, -1:], before[i, -1:]) for i, reading in enumerate(read)]
        return torch.cat(scores)

    @abstractmethod
    def reading(self, model: HookedMLLM, layout: TokenLayout, example: int) -> Reading:
        """What to read for this example.

        Raises:
            ExperimentError: an answer that cannot be read from these inputs.
        """


Answer = str | int | Sequence[str] | Sequence[int]


@checked
@dataclass(frozen=True)
class LogitDiff(Metric):
    """Logit of the answer minus logit of the wrong answer, at the first token in which they differ."""

    answer: Answer
    wrong: Answer
    unit: ClassVar[str] = "logits, answer minus wrong answer"

    def reading(self, model: HookedMLLM, layout: TokenLayout, example: int) -> Reading:
        ids, others = (_ids(model, answer, example) for answer in (self.answer, self.wrong))
        fork = next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), None)
        if fork is None:
            raise ExperimentError(
                f"the answers {self.answer!r} and {self.wrong!r} do not differ in a token",
                "two answers that diverge at some token",
                "give another wrong answer",
            )
        right, wrong = ids[fork], others[fork]
        position = _predicting(layout, fork + 1)[fork]
        return Reading((position,), lambda logits, clean: logits[:, 0, right] - logits[:, 0, wrong])


def _of_answer(model: HookedMLLM, layout: TokenLayout, answer: "Answer", example: int) -> Reading:
    """The log-probability of the whole answer."""
    ids = _ids(model, answer, example)
    return Reading(_predicting(layout, len(ids)), lambda logits, clean: _log_prob(logits, ids))


@checked
@dataclass(frozen=True)
class LogProb(Metric):
    """Log-probability of the whole answer."""

    answer: Answer
    unit: ClassVar[str] = "log-probability, nats"

    def reading(self, model: HookedMLLM, layout: TokenLayout, example: int) -> Reading:
        return _of_answer(model, layout, self.answer, example)


@checked
@dataclass(frozen=True)
class Probability(Metric):
    """Probability of the whole answer."""

    answer: Answer
    unit: ClassVar[str] = "probability"

    def reading(self, model: HookedMLLM, layout: TokenLayout, example: int) -> Reading:
        log_prob = _of_answer(model, layout, self.answer, example)
        return replace(log_prob, score=lambda logits, clean: log_prob.score(logits, clean).exp())


@checked
@dataclass(frozen=True)
class Rank(Metric):
    """How many tokens are likelier than the answer's first token: at 0, greedy decoding would pick it."""

    answer: Answer
    unit: ClassVar[str] = "rank, 0 is the likeliest"

    def reading(self, model: HookedMLLM, layout: TokenLayout, example: int) -> Reading:
        token = _ids(model, self.answer, example)[0]
        return Reading(
            _predicting(layout, 1), lambda logits, clean: (logits[:, 0] > logits[:, 0, token, None]).sum(-1).float()
        )


@dataclass(frozen=True)
class KL(Metric):
    """Kullback-Leibler divergence of the next token from the clean run: ``KL(clean || run)``, 0 in the clean run."""

    unit: ClassVar[str] = "nats"

    def reading(self, model: HookedMLLM, layout: TokenLayout, example: int) -> Reading:
        def divergence(logits: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
            wide = torch.promote_types(logits.dtype, torch.float32)
            p, q = clean[0].to(wide).log_softmax(-1), logits[:, 0].to(wide).log_softmax(-1)
            return (p.exp() * (p - q)).sum(-1)

        return Reading(_predicting(layout, 1), divergence)


@checked
@dataclass(frozen=True, repr=False)
class OfLogits(Metric):
    """A function of your own: logits [row 1 vocab] that predict the answer's first token -> one number for each row.

    A function given in place of a metric becomes one: ``activation_patching(..., lambda logits: logits[:, -1, 4])``.
    Attribution differentiates it.
    """

    function: Callable[..., Any]
    unit: ClassVar[str] = "as your function returns it"

    def __repr__(self) -> str:
        return f"OfLogits({getattr(self.function, '__qualname__', type(self.function).__name__)})"

    def reading(self, model: HookedMLLM, layout: TokenLayout, example: int) -> Reading:
        if model is not None:
            given = self.function(torch.zeros(2, 1, model.cfg.d_vocab, device=model.device))
            if not isinstance(given, torch.Tensor) or given.shape != (2,):
                of = f" of shape {tuple(given.shape)}" if isinstance(given, torch.Tensor) else ""
                raise ExperimentError(
                    f"a {type(given).__name__}{of} from {self!r} for two rows of logits",
                    "a tensor with a number for each row",
                    "index the last position and a token: lambda logits: logits[:, -1, token]",
                )
        return Reading(_predicting(layout, 1), lambda logits, clean: self.function(logits))


def _as_metric(name: str, value: Any) -> Metric:
    if isinstance(value, Metric):
        return value
    if callable(value) and not isinstance(value, type):
        return OfLogits(value)
    raise ExperimentError(f"{name}={short(value)}", METRIC, "build one: mech.LogitDiff(answer, wrong)")


METRIC = "a metric, or a function of logits [row 1 vocab]"
AnyMetric = Annotated[Metric, arguments.Reading(_as_metric, METRIC)]


def _ids(model: HookedMLLM | None, answer: Answer, example: int) -> tuple[int, ...]:
    if isinstance(answer, Sequence | np.ndarray) and not isinstance(answer, str):
        if example >= len(answer):
            raise ExperimentError(
                f"{len(answer)} answers for example {example + 1}", "one answer for each example", "give one for each"
            )
        for text in answer:  # all of them with the first, so that none is refused after a forward
            if not isinstance(text, str):
                _token(model, text)
        answer = answer[example]
    if not isinstance(answer, str):
        return (_token(model, answer),)
    if model is None:
        raise ExperimentError(
            f"the answer {answer!r} without a tokenizer", "token ids, or the model whose tokens they are",
            "call metric(logits, model=model)",
        )  # fmt: skip
    return tuple(model.processor.answer_ids(answer))


def _token(model: HookedMLLM | None, token: Any) -> int:
    """A token id that is in the vocabulary; without a model, one that could be."""
    if model is not None:
        return model.token_id(token)
    if isinstance(token, bool) or not isinstance(token, int | np.integer) or token < 0:
        raise InputError(
            f"the token {token!r}", "an id of at least 0, or a string together with the model", "give its id"
        )
    return int(token)


class _Last:
    """The layout of logits alone: only their last position is known."""

    spans: ClassVar[dict[str, tuple[int, ...]]] = {}

    def positions(self, where: str) -> tuple[int]:
        return (-1,)


_LAST = _Last()


def _predicting(layout: TokenLayout, tokens: int) -> tuple[int, ...]:
    """The positions that predict the first ``tokens`` tokens of the answer."""
    given = layout.spans.get("answer", ())
    if len(given) < tokens - 1:
        raise ExperimentError(
            f"an answer that is read at its token {tokens}, but inputs that hold {len(given)} tokens of it",
            "inputs with the answer (teacher forcing)",
            "build them with model.inputs_of(sample, answer=True)",
        )
    end = int(layout.positions("last")[0]) + 1 if not given else given[0]
    return tuple(range(end - 1, end - 1 + tokens))


def _log_prob(logits: Float[torch.Tensor, "variant read vocab"], ids: tuple[int, ...]) -> torch.Tensor:
    logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return sum((logp[:, i, token] for i, token in enumerate(ids)), start=logp.new_zeros(len(logp)))
