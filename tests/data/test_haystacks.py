"""The haystacks: seeded, with evidence that really decides the answer, and partners that differ nowhere else."""

import random
from dataclasses import replace

import numpy as np
import pytest

from mech.data import haystacks as module
from mech.data.haystacks import COLOURS, DOMAINS, MOST, NAMES, PICTURES, draw_scene, glyphs, haystacks
from mech.data.regions import Box, Frames, Mask, Pages
from mech.data.samples import Sample, Samples
from mech.errors import InputError, RegionError


def pictures(sample: Sample) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in sample.images or sample.video]).astype(int)


def inside(sample: Sample) -> np.ndarray:
    """True at the pixels of the evidence."""
    mask = np.zeros(pictures(sample).shape[:3], dtype=bool)
    for region in sample.evidence:
        match region:
            case Box():
                mask[region.image, int(region.y0) : int(region.y1), int(region.x0) : int(region.x1)] = True
            case Pages() | Frames():
                mask[list(region.indices)] = True
    return mask


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_same_seed_gives_the_same_samples_however_many(domain):
    few, many = haystacks(domain, 3, seed=5), haystacks(domain, 8, seed=5)
    assert few.digest() == many[:3].digest()
    assert few.digest() != haystacks(domain, 3, seed=6).digest()


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_partner_differs_in_the_evidence_alone_and_in_the_answer(domain):
    for sample in haystacks(domain, 20, seed=1):
        partner = sample.counterfactual
        assert partner.answer != sample.answer and partner.question == sample.question
        changed = (pictures(sample) != pictures(partner)).any(-1)
        assert changed.any() and not (changed & ~inside(sample)).any()
        assert partner.evidence == sample.evidence


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_answer_occurs_and_no_position_gives_it_away(domain):
    samples = haystacks(domain, 300, seed=2)
    counts = np.bincount([int(sample.answer) for sample in samples], minlength=10)
    assert counts.min() >= 12  # 30 expected of each
    assert len({sample.evidence for sample in samples}) > (2 if domain in ("pages", "video") else 5)


@pytest.mark.parametrize("domain", DOMAINS)
def test_scenes_may_hold_fewer_items(domain):
    for n_items in (1, MOST[domain]):
        assert len(haystacks(domain, 2, n_items=n_items)) == 2


def test_handwriting_of_the_test_split_is_never_trained_on():
    train, test = glyphs("train"), glyphs("test")
    for value in range(10):
        assert not set(train[value]) & set(test[value])
        assert len(train[value]) > 100 and len(test[value]) > 20


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: haystacks("groundin", 1), "use 'grounding'"),
        (lambda: haystacks("video", 1, n_items=99), "1 to 8"),
        (lambda: haystacks("video", 0), "at least 1"),
        (lambda: haystacks("video", 1, split="dev"), "'train' or 'test'"),
        (lambda: haystacks("video", 1, n_pictures=9), "an even number of frames"),
        (lambda: haystacks("pages", 1, n_pictures=2), "3 pages or more"),
        (lambda: haystacks("grounding", 1, n_pictures=2), "one image"),
        (lambda: Sample("?", "!"), "neither images nor a video"),
        (lambda: haystacks("pages", 2).split(1.5), "between 0 and 1"),
    ],
)
def test_bad_requests_say_what_to_do(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_a_box_must_hold_a_pixel():
    with pytest.raises(RegionError, match="from_xywh"):
        Box(10, 10, 10, 20)
    assert Box.from_xywh(1, 2, 3, 4) == Box(1, 2, 4, 6)


def test_a_split_is_disjoint_and_alike_in_every_domain():
    samples = haystacks("grounding", 10) + haystacks("video", 6)
    find, test = samples.split(0.5, seed=3)
    assert {s.id for s in find} | {s.id for s in test} == {s.id for s in samples}
    assert not {s.id for s in find} & {s.id for s in test}
    assert [sum(s.domain == d for s in find) for d in samples.domains] == [5, 3]
    assert samples.split(0.5, seed=3)[0].digest() == find.digest()


def test_digests_see_whatever_changes_a_number():
    sample = haystacks("grounding", 1)[0]
    pixels = np.zeros((96, 96), dtype=bool)
    pixels[0, 0] = True
    changed = [
        sample,
        replace(sample, counterfactual=None),
        replace(sample, counterfactual=sample.counterfactual.counterfactual or sample),
        replace(sample, fps=1.0),
        replace(sample, evidence=(Mask(pixels),)),
        replace(sample, evidence=(Mask(~pixels),)),
        replace(sample, images=sample.counterfactual.images),
    ]
    assert len({Samples([one]).digest() for one in changed}) == len(changed)
    assert Mask(pixels) == Mask(pixels.copy()) != Mask(~pixels)


@pytest.mark.parametrize(("domain", "n_pictures"), [("pages", 40), ("video", 60)])
def test_longer_scenes_ask_as_much_and_fill_the_room_with_what_nobody_asks_about(domain, n_pictures):
    samples = haystacks(domain, 6, seed=4, n_pictures=n_pictures)
    assert samples.digest() == haystacks(domain, 9, seed=4, n_pictures=n_pictures)[:6].digest()
    assert not {sample.id for sample in samples} & {sample.id for sample in haystacks(domain, 6, seed=4)}
    spread = set()
    for sample in samples:
        mine, theirs = (s.images or s.video for s in (sample, sample.counterfactual))
        assert len(mine) == n_pictures
        changed = {i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a is not b}
        indices = set(sample.evidence[0].indices)
        assert changed and changed <= indices
        assert (pictures(sample) != pictures(sample.counterfactual)).any((1, 2, 3)).nonzero()[0].tolist() == [*changed]
        spread |= indices
    assert max(spread) > n_pictures / 2


@pytest.mark.parametrize("domain", ["pages", "video"])
def test_what_fills_a_long_scene_is_never_what_is_asked_about(domain, monkeypatch):
    """Seen by what is drawn: the keys of the lines and frames, those of the filling and those of the items."""
    drawn = []
    monkeypatch.setattr(module, "_draw", lambda domain, canvas, item: drawn.append(item))
    scene = draw_scene(domain, random.Random(3), MOST[domain], "test", 40)
    asked, filling = {item.key for item in scene.items}, {item.key for item in drawn}
    keys = NAMES if domain == "pages" else tuple(COLOURS)
    assert len(asked) == len(scene.items) == MOST[domain] and filling == set(keys) - asked
    places = {(item.picture, item.y // 16, item.x // 16) for item in drawn}
    assert not places & {(item.picture, item.y // 16, item.x // 16) for item in scene.items}
    room = 40 * 6 if domain == "pages" else 20 * 16
    assert len(places) == pytest.approx(room / 2, rel=0.15)
    drawn.clear()
    draw_scene(domain, random.Random(3), MOST[domain], "test")
    assert not drawn


@pytest.mark.parametrize("domain", ["pages", "video"])
def test_the_default_length_is_the_same_whether_said_or_not(domain):
    assert haystacks(domain, 2, n_pictures=PICTURES[domain]).digest() == haystacks(domain, 2).digest()
