"""``Sample``: a question about images, a video or a text, its answer, and where the evidence is.

Samples are frozen values. ``Samples`` is a list of them that can be split into disjoint parts (samples that find heads
never test them), filtered by domain, and identified by a digest, so that a result records the data behind it.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, overload

import numpy as np
from PIL import Image

from mech.arguments import NOT_EMPTY, Count, Positive, Seed, Share, checking
from mech.data.regions import Box, Frames, Mask, Pages, Passage, Region
from mech.errors import InputError, printable
from mech.notebook import Shown


@checking(InputError)
@dataclass(frozen=True)
class Distractor:
    """A region that looks like evidence but is not, and the answer to the same question asked about it."""

    region: Region
    answer: str


@checking(InputError)
@dataclass(frozen=True)
class Span:
    """The evidence for a part of an answer: ``evidence`` shows ``answer[start:stop]``."""

    start: int
    stop: int
    evidence: tuple[Region, ...]


@checking(InputError)
@dataclass(frozen=True)
class Sample(Shown):
    """One question with its evidence.

    ``distractors`` are regions of the same pictures that answer the question about something else, each with another
    answer: heads are redirected to them (``mech.redirection``), and a contrastive score subtracts them.
    ``counterfactual`` has the same layout with the evidence changed so that ``answer`` changes: it provides the
    corrupted run of activation patching and the wrong answer of a logit difference. ``spans`` say where the parts of a
    longer answer are shown; parts without a span rest on all of the evidence. A ``context`` is a text before the
    question, with pictures or instead of them; evidence in it is a ``Passage``.
    """

    question: str
    answer: str
    images: tuple[Image.Image, ...] = field(default=(), repr=False)
    video: tuple[Image.Image, ...] = field(default=(), repr=False)
    fps: Positive = 2.0
    evidence: tuple[Region, ...] = ()
    domain: str = "default"
    id: str = ""
    counterfactual: "Sample | None" = field(default=None, repr=False)
    distractors: tuple[Distractor, ...] = field(default=(), repr=False)
    spans: tuple[Span, ...] = field(default=(), repr=False)
    context: str = field(default="", repr=False)

    def __post_init__(self):
        if (self.images and self.video) or not (self.images or self.video or self.context):
            given = "both images and a video" if self.images else "neither images nor a video"
            expected = "one of the two, or a context"
            raise InputError(f"sample {self.id!r} has {given}", expected, "pass images=(...) or video=(...)")
        for passage in self.passages():
            if passage.stop > len(self.context):
                raise InputError(
                    f"sample {self.id!r} has {passage!r} in a context of {len(self.context)} characters",
                    "a passage inside it", "pass the text as context=",
                )  # fmt: skip

    def passages(self) -> tuple[Passage, ...]:
        """The passages of the context that are evidence, for the answer or a part of it, or distractors."""
        parts = [
            *(region for span in self.spans for region in span.evidence),
            *(distractor.region for distractor in self.distractors),
        ]
        regions = (*self.evidence, *parts)
        return tuple(dict.fromkeys(region for region in regions if isinstance(region, Passage)))

    def digest(self) -> str:
        """A SHA-256 over the question, the answer, the evidence (and its spans), every pixel and the counterfactual."""
        words = [self.question, self.answer, self.domain, repr(self.evidence), self.fps, bool(self.video)]
        words += [word for word in (repr(self.spans) if self.spans else "", self.context) if word]
        sha = hashlib.sha256(json.dumps(words).encode())
        for picture in (*self.images, *self.video):
            sha.update(f"{picture.mode}{picture.size}".encode())
            sha.update(picture.tobytes())
        for region in (*self.evidence, *(distractor.region for distractor in self.distractors)):
            if isinstance(region, Mask):
                sha.update(f"{region.pixels.shape}".encode() + region.pixels.tobytes())
        if self.distractors:
            sha.update(repr(self.distractors).encode())
        if self.counterfactual is not None:
            sha.update(self.counterfactual.digest().encode())
        return sha.hexdigest()


@checking(InputError)
class Samples(Shown, Sequence[Sample]):
    """A frozen list of samples."""

    def __init__(self, samples: Sequence[Sample] | Iterator[Sample]):
        self._samples = tuple(samples)

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> "Samples": ...
    def __getitem__(self, index: int | slice) -> "Sample | Samples":
        return Samples(self._samples[index]) if isinstance(index, slice) else self._samples[index]

    def __add__(self, other: "Samples") -> "Samples":
        return Samples((*self._samples, *other))

    def __repr__(self) -> str:
        counts = ", ".join(f"{domain}: {sum(s.domain == domain for s in self)}" for domain in self.domains)
        return f"Samples({printable(counts)})"

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(sample.domain for sample in self))

    @property
    def names(self) -> list[str]:
        """The id of every sample, or its index if it has none."""
        return [sample.id or str(i) for i, sample in enumerate(self)]

    @checking(InputError)
    def where(self, keep: Callable[[Sample], bool]) -> "Samples":
        return Samples([sample for sample in self if keep(sample)])

    @checking(InputError)
    def split(self, fraction: Share = 0.5, seed: Seed = 0) -> tuple["Samples", "Samples"]:
        """Two disjoint parts, the first with ``fraction`` of the samples; every domain is split in this proportion."""
        chosen: set[int] = set()
        for domain in self.domains:
            indices = [i for i, sample in enumerate(self) if sample.domain == domain]
            random.Random(f"{seed}/{domain}").shuffle(indices)
            chosen.update(indices[: round(fraction * len(indices))])
        first = Samples([s for i, s in enumerate(self) if i in chosen])
        return first, Samples([s for i, s in enumerate(self) if i not in chosen])

    @checking(InputError)
    def draw(self, n: Count, seed: Seed = 0) -> "Samples":
        """At most ``n`` samples of each domain, drawn at random and kept in order."""
        chosen = drawn([sample.domain for sample in self], n, seed)
        return Samples([sample for i, sample in enumerate(self) if i in chosen])

    def digest(self) -> str:
        """One SHA-256 for the whole list, order included."""
        return hashlib.sha256("".join(sample.digest() for sample in self).encode()).hexdigest()


SomeSamples = Annotated[Samples | Sequence[Sample], NOT_EMPTY]


def drawn(domains: Sequence[str], n: int, seed: int = 0) -> set[int]:
    """The indices of the samples drawn, at most ``n`` per domain, given the domain of every sample."""
    chosen: set[int] = set()
    for domain in dict.fromkeys(domains):
        indices = [i for i, own in enumerate(domains) if own == domain]
        chosen.update(random.Random(f"{seed}/{domain}/draw").sample(indices, min(n, len(indices))))
    return chosen


def pictures_of(sample: Sample, frames_per_token: int = 1) -> tuple[Image.Image, ...]:
    """The pictures to show for a sample: its images, or the first frame of each temporal patch of its video."""
    return sample.video[::frames_per_token] or sample.images


def outlines(sample: Sample, frames_per_token: int = 1) -> list[list[float]]:
    """The evidence as rectangles ``[picture, x0, y0, x1, y1]`` over ``pictures_of``; for a mask, its bounding box."""
    boxes: list[list[Any]] = []

    def shown(region: Box | Mask) -> int:
        return region.image if region.frame is None else region.frame // frames_per_token

    for region in sample.evidence:
        if isinstance(region, Box):
            boxes.append([shown(region), region.x0, region.y0, region.x1, region.y1])
        elif isinstance(region, Pages):
            boxes += [[page, 0, 0, *sample.images[page].size] for page in region.indices]
        elif isinstance(region, Frames):
            patches = dict.fromkeys(frame // frames_per_token for frame in region.indices)
            boxes += [[patch, 0, 0, *sample.video[0].size] for patch in patches]
        elif isinstance(region, Mask):
            rows, cols = np.nonzero(region.pixels)
            boxes.append([shown(region), *map(float, (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1))])
    return boxes
