"""Haystacks that are answered in several tokens: numbers, names, sentences, and where each part is to be seen."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from mech.data import answers
from mech.data.haystacks import DOMAINS, haystacks
from mech.data.jsonl_writing import write_samples
from mech.data.regions import Box, Passage
from mech.errors import InputError, RegionError

LONGER = [kind for kind in answers.ANSWERS if kind != "digit"]


def pixels(sample):
    return np.stack([np.asarray(picture) for picture in sample.images or sample.video]).astype(int)


def inside(box: Box, shape) -> np.ndarray:
    """Which pixels of a sample's pictures a box holds."""
    mask = np.zeros(shape[:3], dtype=bool)
    mask[box.image if box.frame is None else box.frame, int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)] = True
    return mask


def said(domain, key, number):
    return f"{key} scored {number}" if domain in ("documents", "pages") else f"The {key} number is {number}"


@pytest.mark.parametrize("answer", LONGER)
@pytest.mark.parametrize("domain", DOMAINS)
def test_the_part_of_a_longer_answer_that_changes_is_where_its_span_says(domain, answer):
    """Partners differ in the picture only inside the span whose characters differ in the answer."""
    for sample in haystacks(domain, 5, seed=2, answer=answer):
        other = sample.counterfactual
        if answer == "name":
            ((start, stop),) = [(span.start, span.stop) for span in sample.spans]
            assert sample.answer[start:stop] == sample.answer != other.answer and sample.question == other.question
        else:
            start = len(sample.answer) - 1
            assert sample.answer[:start] == other.answer[:start] and sample.answer[start] != other.answer[start]
            assert sample.answer[start:].isdigit() and sample.question == other.question
        (span,) = [span for span in sample.spans if span.start == start]
        before, after = pixels(sample), pixels(other)
        changed = (before != after).any(-1)
        held = np.any([inside(box, before.shape) for box in span.evidence], axis=0)
        assert changed.any() and not (changed & ~held).any()


@pytest.mark.parametrize("domain", DOMAINS)
def test_sentences_name_what_is_asked_for_and_every_part_has_evidence(domain):
    for sample in haystacks(domain, 5, seed=4, answer="sentence"):
        parts = [sample.answer[span.start : span.stop] for span in sample.spans]
        key, *digits = parts
        assert key in sample.question and "".join(digits) == sample.answer[-3:]
        assert sample.answer == said(domain, key, "".join(digits))
        places = [span.evidence[0] for span in sample.spans[1:]]
        assert [round((b.x0 - a.x0) / 16) for a, b in pairwise(places)] == [1, 1]
        height, width = pixels(sample).shape[1:3]
        assert all(0 <= box.x0 < box.x1 <= width and 0 <= box.y0 < box.y1 <= height for box in places)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_name_is_asked_for_by_a_number_that_stands_once(domain):
    for sample in haystacks(domain, 8, seed=1, answer="name"):
        assert any(word.strip(".?").isdigit() and len(word.strip(".?")) == 3 for word in sample.question.split())
        assert sample.answer not in sample.question


def test_one_digit_is_asked_for_as_it_always_was():
    """The option leaves the default alone: the same pictures, questions and answers as before there was one."""
    told = {domain: "".join(s.answer for s in haystacks(domain, 8, seed=3)) for domain in DOMAINS}
    assert told == {"grounding": "21109040", "documents": "39708143", "pages": "33902889", "video": "93156457"}
    assert not any(sample.spans for domain in DOMAINS for sample in haystacks(domain, 2))
    assert haystacks("pages", 3, answer="digit").digest() == haystacks("pages", 3).digest()


def test_spans_are_part_of_what_a_sample_is():
    sample = haystacks("documents", 1, answer="number")[0]
    assert sample.digest() != replace(sample, spans=sample.spans[1:]).digest()


def test_an_unknown_kind_of_answer_says_which_there_are():
    with pytest.raises(InputError, match="use 'sentence'"):
        haystacks("pages", 1, answer="sentense")
    with pytest.raises(InputError, match="1 to 8 for 'grounding'"):
        haystacks("grounding", 1, n_items=9, answer="number")


@pytest.mark.parametrize("answer", answers.ANSWERS)
@pytest.mark.parametrize("domain", DOMAINS)
def test_a_scene_written_out_asks_the_same_and_holds_the_answer_where_its_evidence_says(domain, answer):
    pictures, texts = (haystacks(domain, 4, seed=6, answer=answer, form=form) for form in ("pictures", "text"))
    for shown, sample in zip(pictures, texts, strict=True):
        assert (sample.id, sample.question, sample.answer) == (shown.id, shown.question, shown.answer)
        assert sample.counterfactual.answer == shown.counterfactual.answer and not (sample.images or sample.video)
        assert sample.domain == f"{domain}-text"
        (line,) = sample.evidence
        other = sample.counterfactual
        assert sample.context[: line.start] == other.context[: line.start]
        assert sample.context[line.stop :] == other.context[other.evidence[0].stop :]
        for span in sample.spans:
            (place,) = span.evidence
            part = sample.answer[span.start : span.stop]
            assert sample.context[place.start : place.stop] == part and line.start <= place.start < place.stop
        if answer == "digit":
            assert sample.context[line.start : line.stop].endswith(f": {sample.answer}")


def test_a_passage_must_lie_in_the_context():
    sample = haystacks("pages", 1, form="text")[0]
    with pytest.raises(InputError, match="in a context of"):
        replace(sample, context=sample.context[: sample.evidence[0].stop - 1])
    with pytest.raises(RegionError, match="holds no character"):
        Passage(3, 3)
    with pytest.raises(InputError, match="'pictures' or 'text'"):
        haystacks("pages", 1, form="words")


def test_samples_that_files_do_not_hold_are_refused(tmp_path):
    written, numbers = haystacks("pages", 1, form="text")[0], haystacks("pages", 1, answer="number")[0]
    for sample in (written, numbers, replace(haystacks("pages", 1)[0], counterfactual=written)):
        with pytest.raises(InputError, match="a context or spans"):
            write_samples([sample], tmp_path)
    assert not list(tmp_path.iterdir())
