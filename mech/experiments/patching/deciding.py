"""At which position does a head decide? Where replacing its output by the counterfactual's loses most of the answer.

deciding_queries(model, sample, [(0, 2), (2, 2)])       # [(31, 0.99), None]: position, share of the answer lost
"""

from dataclasses import replace

from mech.arguments import checked
from mech.data.samples import Sample
from mech.errors import ExperimentError
from mech.experiments.metrics import LogitDiff
from mech.experiments.patching.activation import swept
from mech.experiments.patching.plan import Plan, Sweep, effect_of, pairs_of
from mech.indices import Pairs
from mech.interventions.specs import check_heads
from mech.model import HookedMLLM


@checked
def deciding_queries(
    model: HookedMLLM, sample: Sample, heads: Pairs, threshold: float = 0.02
) -> list[tuple[int, float] | None]:
    """For each head, the query position that matters most, among the question's positions and the last one.

    ``lost = (clean - noised) / (clean - corrupted)``, where noising replaces the head's output at this position alone
    by the counterfactual's. None for a head that loses less than ``threshold`` at every position. Unit: share of the
    gap.

    Raises:
        ExperimentError: no heads, a head that does not exist, no counterfactual of the same layout, or two answers that
            have the same first token.

    Cost: three forwards and, for each head and position, the layers from there on.
    """
    if sample.counterfactual is None:
        raise ExperimentError(f"sample {sample.id!r} without a counterfactual", "one", "set Sample.counterfactual")
    check_heads(model, heads)
    ((clean, corrupted),) = pairs_of(model, sample, None)
    layout, metric = clean.layouts[0], LogitDiff(sample.answer, sample.counterfactual.answer)
    positions = sorted({int(at) for name in ("question", "last") for at in layout.positions(name)})
    layers = sorted({layer for layer, _ in heads})
    sweep = Sweep(over=("layer", "head", "position"), positions=positions, layers=layers)
    plan = Plan.of(model, clean, corrupted, metric, sweep)
    wanted = set(map(tuple, heads))
    plan = replace(plan, cells=[cell for cell in plan.cells if (cell.layers[0], cell.head) in wanted])
    part = swept(model, plan, "noise", "auto", lambda times: None)
    values, plain, changed = (x.double().cpu().numpy() for x in (part.values, part.clean, part.corrupted))
    lost = effect_of(values, plain, changed, "noise")[0]
    deciding: list[tuple[int, float] | None] = []
    for head in map(tuple, heads):
        costs = [
            (float(value), positions[cell.region])
            for cell, value in zip(plan.cells, lost, strict=True)
            if (cell.layers[0], cell.head) == head
        ]
        most, position = max(costs)
        deciding.append((position, most) if most >= threshold else None)
    return deciding
