"""Right calls of sparse inference and pruning."""

import mech
from right_calls.given import OTHER, RUN, TOLD, USUAL, Call, Given, entered


def calls(given: Given) -> dict[str, Call]:
    return {
        "acceleration": Call(
            mech.acceleration,
            {**given.tested, "find": given.find},
            {
                **RUN,
                "find": "samples",
                "window": "?count",
                "sinks": "whole",
                "choices": "words",
                "shares": "amounts",
                "n_random": "count",
                "rankings": "*rankings",
                "turns": "whole",
                **USUAL,
                **TOLD,
                **OTHER,
            },
        ),
        "learned_gates": Call(
            mech.learned_gates,
            given.tested,
            {
                **RUN,
                "sinks": "whole",
                "window": "count",
                "steps": "count",
                "rate": "positive",
                "sparsity": "number",
                **USUAL,
                **TOLD,
            },
        ),
        "dense_static": Call(
            entered(mech.dense_static), {"model": given.model}, {"model": "model", "graph": "flag or auto"}
        ),
        "localize": Call(
            entered(mech.localize),
            {"model": given.model},
            {
                "model": "model",
                "policy": "?ranking",
                "dense_heads": "*heads",
                "sinks": "?whole",
                "window": "?count",
                "keep_text": "?flag",
                "phase": "?word",
                "graph": "flag or auto",
                "auto": "flag",
            },
        ),
        "sparsify": Call(
            mech.sparsify,
            given.tested,
            {
                **RUN,
                "sinks": "whole",
                "window": "count",
                "target": "?positive",
                "strength": "?positive",
                "at_most": "?amount",
                "rank": "whole",
                "steps": "count",
                "rate": "positive",
                **USUAL,
                **TOLD,
            },
        ),
        "localize_dynamic": Call(
            entered(mech.localize_dynamic),
            {"model": given.model, "n": 2},
            {
                "model": "model",
                "n": "amount",
                "sinks": "whole",
                "window": "count",
                "layers": "?count",
                "keep_text": "flag",
                "phase": "word",
            },
        ),
        "prune_heads": Call(
            mech.prune_heads,
            {"model": given.model, "heads": [(0, 0)], "to": "zero"},
            {"model": "model", "heads": "heads", "to": "word", "reference": "*samples", **OTHER},
        ),
        "pruning_report": Call(
            mech.pruning_report,
            {**given.tested, "pruned": None},
            {**RUN, "pruned": "ranking", "batch_size": "count", "turns": "whole"},
        ),
        "Policy": Call(mech.Policy, {}, {"sinks": "whole", "window": "count", "keep_text": "flag", "phase": "word"}),
    }
