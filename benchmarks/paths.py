"""Path patching from every head, compared with the recipe of two whole forwards per sender.

    python benchmarks/paths.py                           # about two minutes

The model and the unit are those of ``sweeps.py``: 12 layers x 12 heads, 600 tokens, processor time of one thread, a
*forward* is transformers' SDPA forward that unembeds one row. All 144 heads send, to the logits and into the query of
L11H0 at the last position, attention frozen; the recipe takes 144 forwards for the path runs and 132 for the
receiving ones. The whole call is timed, its two captures included.
"""

import argparse
import statistics

import numpy as np
from record import one_thread, record
from sweeps import METRIC, SIZE, opened, seconds

from mech.experiments.paths.path_patching import path_patching

RECEIVERS, BELOW = ("logits", "L11H0.q"), SIZE * (SIZE - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    with one_thread():
        model, clean, corrupted = opened(600)
        options = {"receivers": RECEIVERS, "receiver_positions": "last"}
        heads = [(layer, head) for layer in range(SIZE) for head in range(SIZE)]
        few = heads[:: 5 * SIZE + 1]
        slow = path_patching(model, clean, corrupted, METRIC, senders=few, method="literal", **options)
        fast = path_patching(model, clean, corrupted, METRIC, senders=few, method="walk", **options)
        np.testing.assert_allclose(fast.metric, slow.metric, atol=1e-5)  # logits are of size 1
        ratios = []
        for _ in range(given.repeats):
            forward = seconds(lambda: model.hf_model(**clean.tensors, use_cache=False, logits_to_keep=1))
            whole = seconds(lambda: path_patching(model, clean, corrupted, METRIC, senders=heads, **options))
            ratios.append((len(heads) + BELOW) * forward / whole)
        record(
            "paths_vs_literal", statistics.median(ratios), unit="x", bar=">= 60",
            compared_with="two SDPA forwards for each of 144 senders (one for the last layer's)",
            what="paths of every head to the logits and to one query, attention frozen, captures included",
        )  # fmt: skip


if __name__ == "__main__":
    main()
