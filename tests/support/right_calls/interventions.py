"""Right calls of interventions and corrupted samples."""

from functools import partial

import mech
from right_calls.given import OTHER, RUN, USUAL, Call, Given, intervened

PLACED = {"heads": "heads", "positions": "where"}


def calls(given: Given) -> dict[str, Call]:
    return {
        "with_question": Call(
            mech.with_question,
            {"sample": given.sample, "question": "What?", "answer": "3"},
            {"sample": "sample", "question": "text", "answer": "text"},
        ),
        "intervene": Call(
            intervened, {"model": given.model, "specs": mech.Scale([(0, 0)], 2.0)}, {"model": "model", "specs": "specs"}
        ),
        "reference_activations": Call(
            mech.reference_activations, given.tested, {**RUN, "point": "word", "n_draws": "count", **USUAL}
        ),
        "with_counterfactuals": Call(mech.with_counterfactuals, given.tested, {**RUN, "by": "word"}),
        "without_evidence": Call(mech.without_evidence, {"sample": given.sample}, {"sample": "sample", "by": "word"}),
        "without_pictures": Call(
            mech.without_pictures,
            {"model": given.model, "inputs": given.inputs},
            {"model": "model", "inputs": "inputs", "reference": "*several inputs"},
        ),
        "Ablate": Call(
            mech.Ablate,
            {"heads": [(0, 0)], "to": "zero"},
            {"point": "word", "to": "word", "phase": "word", "reference": "*samples", "seed": "seed", **OTHER},
        ),
        "Custom": Call(mech.Custom, {"point": "hook_embed", "fn": print}, {"point": "path", "fn": "function"}),
        "Knockout": Call(mech.Knockout, {}, {"phase": "word"}),
        "Patch": Call(mech.Patch, {"source": given.inputs, "heads": [(0, 0)]}, {"point": "word", "source": "*source"}),
        "Scale": Call(mech.Scale, {"heads": [(0, 0)], "factor": 2.0}, {"factor": "number", "phase": "word"}),
        "PerRow": Call(mech.PerRow, {}, {"rows": "rows"}),
        "Ablate, run": Call(partial(given.run_with, mech.Ablate), {"heads": [(0, 0)], "to": "zero"}, PLACED),
        "Patch, run": Call(partial(given.run_with, mech.Patch), {"heads": [(0, 0)], "source": given.inputs}, PLACED),
        "Scale, run": Call(partial(given.run_with, mech.Scale), {"heads": [(0, 0)], "factor": 2.0}, PLACED),
        "Knockout, run": Call(
            partial(given.run_with, mech.Knockout), {}, {"query": "where", "key": "where", "layers": "*layers"}
        ),
        "Redirect, run": Call(
            partial(given.run_with, mech.Redirect),
            {"heads": [(0, 0)], "to": "image", "bias": 1.0},
            {"heads": "heads", "to": "where", "bias": "number", "query": "where", "phase": "word"},
        ),
    }
