"""``published_claims``: every point at once, as sentences, as a table and as numbers."""

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mech.arguments import Count, Progress, Seed, checked
from mech.data.samples import Samples, SomeSamples
from mech.errors import ExperimentError, MechError
from mech.experiments.findings.cautions import few_samples, few_sets, unstable
from mech.experiments.findings.summary import stability
from mech.experiments.findings.words import TOP
from mech.model import HookedMLLM
from mech.papers.bench import Bench, Point, drop
from mech.papers.disputes import DISPUTES
from mech.papers.weaknesses import WEAKNESSES

KNOWN: dict[str, Callable[[Bench], Point]] = {**WEAKNESSES, **DISPUTES}


@dataclass(frozen=True, eq=False)
class Claims(Mapping[str, Point]):
    """The points of ``published_claims``, by name."""

    model: str
    points: Mapping[str, Point]
    scope: str = ""  # what was measured here: the size of the model, and the samples
    cautions: tuple[str, ...] = ()  # what limits all of them: read these first

    def __getitem__(self, key: str) -> Point:
        if key not in self.points:
            raise ExperimentError.unknown("point", key, self.points)
        return self.points[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def __repr__(self) -> str:
        return f"Claims({self.model}: {', '.join(self.points)})"

    def sentences(self) -> list[str]:
        """One for each point: its name, what was published and on which models, and what was measured on this one."""
        return [
            f"{key}. Published ({point.published}): {point.claim} Here, on {self.scope}: {point.verdict}. {point.text}"
            for key, point in self.points.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        facts = {
            key: {
                "claim": point.claim, "published": point.published, "holds": point.holds, "verdict": point.verdict,
                "text": point.text, "numbers": dict(point.numbers),
            }
            for key, point in self.points.items()
        }  # fmt: skip
        return {"model": self.model, "scope": self.scope, "cautions": list(self.cautions), "points": facts}

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(key)}</td><td style='text-align:left'>{html.escape(point.claim)}"
            f"<br><small>{html.escape(point.published)}</small></td><td>{point.verdict}</td>"
            f"<td style='text-align:left'>{html.escape(point.text)}</td></tr>"
            for key, point in self.points.items()
        )
        head = "<tr><th>point</th><th>published</th><th>here</th><th>measured</th></tr>"
        notes = "".join(f"<p>Caution. {html.escape(text)}</p>" for text in self.cautions)
        title = f"<caption>What was published, and what was measured on {html.escape(self.scope)}</caption>"
        return f"{notes}<table>{title}<thead>{head}</thead><tbody>{rows}</tbody></table>"


@checked
def published_claims(
    model: HookedMLLM,
    samples: SomeSamples,
    only: str | Sequence[str] | None = None,
    *,
    n_random: Count = 20,
    seed: Seed = 0,
    batch_size: Count = 16,
    progress: Progress | None = None,
) -> Claims:
    """Measure every point on one model and one set of samples.

    Args:
        model: a hooked model.
        samples: samples with evidence and answers; half of them find the heads, the others test them.
        only: names of points; all by default.
        n_random: random sets of every size, for comparison.
        seed: seed of the split, the sets and the draws.
        batch_size: samples per forward.
        progress: called with (points done, points in all).

    A point that cannot be measured on this model or these samples says so, and why. A statement that one model differs
    from is not universal; it may hold on the models that it was made on.

    Raises:
        ExperimentError: an unknown point; too few samples, or none with evidence.

    Cost: about ``12 * n_random`` forwards of the text stack per test sample, and a few per sample that finds heads.

    References: arXiv 2606.05843, 2605.27243, 2608.27417.
    """
    wanted = list(KNOWN) if only is None else [only] if isinstance(only, str) else list(only)
    for name in wanted:
        if name not in KNOWN:
            raise ExperimentError.unknown("point", name, KNOWN)
    bench = Bench.of(model, Samples(samples), n_random=n_random, seed=seed, batch_size=batch_size)
    found: dict[str, Point] = {}
    for name in wanted:
        try:
            found[name] = KNOWN[name](bench)
        except MechError as error:  # a point that cannot be measured here is reported, not hidden
            asked = str(KNOWN[name].__doc__).strip().splitlines()[0]
            found[name] = Point(name, asked, f"Not measured: {error.given}.", {"reason": error.given}, decides=False)
        if progress:
            progress(len(found), len(wanted))
    loose, sets = unstable(stability(bench.ranking) or {"inclusion": ()}), few_sets(n_random)
    least = few_samples(len(bench.test), drop(bench.cost(bench.ranking.top(TOP))).as_dict())
    heads = len(bench.ranking)
    here = f"{model.name} ({heads} heads; {', '.join(bench.test.domains)}, {len(bench.test)} test samples)"
    return Claims(str(model.name), found, here, tuple(text for _, text in (*loose, *least, *sets)))
