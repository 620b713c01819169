"""What a head score is: the frozen ``Score``, the papers' scores by name, and the forwards that a set of scores costs.

    PUBLISHED["mm_retrieval"].source            # the paper, and what differs from it here
    passes(("ram", "mm_retrieval"))             # {question: both, null question: mm_retrieval}

``measure.py`` measures them; this module does not need a model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from mech.arguments import checked
from mech.errors import ExperimentError, suggestion
from mech.experiments.ranking.ranking import head_count

OUTPUT = ("answer", "generated")
QUESTION, NULL, OTHER = "question", "null question", "other question"  # the question of a pass
NULLS = {"even": "size", "elsewhere": "random"}  # null of a score -> the calibration that subtracts it
NULLED = ("sum", "mean", "hit", "share")  # reductions that have a value for even attention
SUBTRACTED = {"null_question": NULL, "other_question": OTHER}  # calibrations that cost an extra pass
WORDS: dict[str, tuple[str, ...]] = {
    "queries": ("question", "last", *OUTPUT),
    "reduce": ("sum", "mean", "hit", "hit_size", "share", "value_norm", "trimmed", "entropy"),
    "aggregate": ("mean", "frequency"),
    "calibrate": ("none", "null_question", "other_question", "size", "random", "shifted", "distractors", "no_sinks"),
    "on": ("evidence", "parts", "image"),
}
UNITS = {
    "sum": "attention mass",
    "mean": "attention mass per token",
    "hit": "share of query rows",
    "hit_size": "share of query rows per token",
    "share": "share of visual attention mass",
    "value_norm": "share of value-norm-weighted attention",
    "trimmed": "attention mass",
    "entropy": "share of examples",
}


@checked
@dataclass(frozen=True)
class Score:
    """One way to score a head by its attention ``A`` [query x, key y]; ``E`` are the tokens it is scored on.

    Sign: the higher, the more the head retrieves. Unit: ``UNITS[reduce]``; for a calibrated score a difference in that
    unit; for ``frequency`` a share of examples.

    Attributes:
        queries: rows x: ``"question"``; ``"last"``, the last token of the prompt; ``"answer"``, the rows that *predict*
            each token of the right answer (teacher-forced); ``"generated"``, those that predict the model's own answer.
        reduce: the value of a row: ``"sum"`` of A over E; ``"mean"`` (sum / |E|); ``"hit"``, 1 if the argmax over all
            keys is in E; ``"hit_size"`` (hit / |E|); ``"share"`` (sum / sum over all visual tokens, 0 if a window holds
            none); ``"value_norm"`` (A times the norm of the value, sum over E / sum over all keys); ``"trimmed"``, the
            sum over E without tokens more than two standard deviations below E's mean; ``"entropy"``, low spatial
            entropy (see ``localization.py``).
        aggregate: ``"mean"``: an example counts with its value; ``"frequency"``: it counts 1 if the head is among the
            ``top`` of this example, else 0; heads that tie for the last place are excluded.
        calibrate: what is subtracted. ``"none"``: nothing. ``"null_question"``: the score under the question "N/A".
            ``"other_question"``: the score under the next sample's different question, on the same picture. ``"size"``:
            the value for attention spread evenly over visible keys (for a hit: a random argmax). ``"random"``: the mean
            over regions of the same size and shape elsewhere. ``"shifted"``: the value on E moved half way through the
            visual tokens. ``"distractors"``: the mean over the sample's distractors. Or ``"no_sinks"``: keys with
            massive activations get no attention.
        on: ``"evidence"``; ``"parts"``: each ``"answer"`` row is scored on the evidence of the token it predicts if the
            sample has it (``Sample.spans``), else on all evidence; or ``"image"``: all visual tokens (no evidence
            needed).
        top: heads that count in ``frequency``: a number (all heads if there are fewer) or a share.
        source: the paper, and what differs from it here.
    """

    queries: str = "question"
    reduce: str = "sum"
    aggregate: str = "mean"
    calibrate: str = "none"
    on: str = "evidence"
    top: int | float = 0.05
    source: str = ""

    def __post_init__(self):
        for field, words in WORDS.items():
            if (given := getattr(self, field)) not in words:
                raise ExperimentError(
                    f"a score with {field}={given!r}", ", ".join(words), suggestion(str(given), words)
                )
        head_count(self.top, 10**6, "top")
        for wrong, expected in (
            (self.reduce == "trimmed" and self.calibrate not in ("none", *SUBTRACTED), "no null but a question"),
            (self.on != "evidence" and self.calibrate in ("random", "shifted"), "evidence, the same for all rows"),
            (self.on == "parts" and self.queries != "answer", 'queries="answer": what has parts is the right answer'),
            (self.on == "parts" and self.reduce == "trimmed", 'on="evidence": it is trimmed over all rows'),
            (
                self.calibrate == "distractors" and (self.on != "evidence" or self.reduce not in ("sum", "share")),
                'evidence, reduce="sum" or "share": distractors are of other sizes',
            ),
            (
                self.reduce == "entropy"
                and (self.on, self.aggregate, self.calibrate) != ("image", "frequency", "none"),
                'on="image", aggregate="frequency", calibrate="none"',
            ),
        ):
            if wrong:
                raise ExperimentError(f"{self!r}", f"with reduce={self.reduce!r}, on={self.on!r}: {expected}")

    @property
    def unit(self) -> str:
        if self.aggregate == "frequency":
            return "share of examples"
        return UNITS[self.reduce] + ("" if self.calibrate in ("none", "no_sinks") else ", difference to its null")

    @property
    def definition(self) -> str:
        """The score's settings in one line."""
        return f"{self.queries} rows, {self.reduce} on {self.on}, {self.aggregate} of examples, null: {self.calibrate}"


PUBLISHED: dict[str, Score] = {
    "ram": Score(source="arXiv 2606.05843, Eq. 1"),
    "mm_retrieval": Score(calibrate="null_question", source="MMRetHead, arXiv 2605.27243"),
    "visual_retrieval": Score("answer", source="arXiv 2608.27417; of its variants output tokens, sum, mean"),
    "retrieval_head": Score(
        "generated",
        "hit",
        source="arXiv 2404.15574; a visual token cannot be copied, so that the key need not equal the generated token, "
        "and hits are shares of generated tokens instead of shares of the needle",
    ),
    "sparse_mm": Score(
        "answer",
        "hit_size",
        on="parts",
        source="arXiv 2506.05344; tokens for which a sample names no box of their own share the evidence",
    ),
    "vera": Score(reduce="share", source="arXiv 2602.10146; the question's rows attend, as for RAM"),
    "qr_head": Score(
        reduce="trimmed",
        calibrate="null_question",
        source="arXiv 2506.09944; the evidence in place of the gold document",
    ),
    "localization": Score(
        "last",
        "entropy",
        "frequency",
        on="image",
        top=10,
        source="arXiv 2503.06287; the elbow is taken over these examples, and components do not cross pictures",
    ),
    "gaze": Score("last", source="Gaze heads, arXiv 2606.14703; the evidence in place of the panel that is asked for"),
    "contrastive": Score(
        calibrate="distractors",
        source="Contrastive Retrieval heads, arXiv 2510.02219; evidence and distractors in place of positive and "
        "negative documents, and a plain difference",
    ),
    "vision_mass": Score(on="image", source="the 'vision heads' comparator of arXiv 2606.05843"),
}


def score_called(name: str) -> Score:
    """A published score by its name.

    Raises:
        ExperimentError: no score has this name.
    """
    if name not in PUBLISHED:
        raise ExperimentError.unknown("score", name, PUBLISHED)
    return PUBLISHED[name]


class Pass(NamedTuple):
    """One forward per sample: what it asks, and which text follows the prompt."""

    asked: str
    text: str

    def __str__(self) -> str:
        return self.asked + (f" + {self.text}" if self.text else "")


def passes(scores: Sequence[str] | Mapping[str, Score]) -> dict[Pass, tuple[str, ...]]:
    """The forwards per sample that a set of scores costs, and which scores read each of them.

    Text after the prompt does not change what the prompt's rows see, so if there is a pass with an answer, rows of the
    prompt are read from it too. ``"generated"`` also costs the generation itself.
    """
    named = named_scores(scores)
    plan: dict[Pass, list[str]] = {}
    for asked in (QUESTION, NULL, OTHER):
        texts = {
            name: score.queries if score.queries in OUTPUT else ""
            for name, score in named.items()
            if asked in (QUESTION, SUBTRACTED.get(score.calibrate))
        }
        fullest = next((text for text in OUTPUT if text in texts.values()), "")
        for name, text in texts.items():
            plan.setdefault(Pass(asked, text or fullest), []).append(name)
    return {key: tuple(names) for key, names in plan.items()}


def named_scores(scores: str | Sequence[str] | Mapping[str, Score]) -> dict[str, Score]:
    """Scores by name: from ``PUBLISHED``, or as given.

    Raises:
        ExperimentError: no scores, or an unknown name.
    """
    names = [scores] if isinstance(scores, str) else list(scores)
    if not names:
        raise ExperimentError("no scores", "at least one", f"choose from {', '.join(PUBLISHED)}")
    return dict(scores) if isinstance(scores, Mapping) else {name: score_called(name) for name in names}


def nulls(names: Sequence[str], word: str) -> dict[str, Score]:
    """The scores among ``names`` that have the null ``word`` (a key of ``NULLS``), with this null subtracted.

    They need no extra forward: ``head_scores`` reads them from the same forwards.
    """
    plain = {name: score for name in names if (score := PUBLISHED[name]).calibrate == "none" and score.reduce in NULLED
             and score.aggregate == "mean" and score.on == "evidence"}  # fmt: skip
    return {f"{name} {word}": replace(score, calibrate=NULLS[word]) for name, score in plain.items()}


def is_null(name: str) -> bool:
    """Whether a score is measured only to give the null of another one."""
    return name.rpartition(" ")[2] in NULLS
