"""Scores by which heads are ranked: Retrieval Attention Mass, its relatives in the literature, and what controls them.

Takes a model and samples with evidence, gives a score for every (example, layer, head) with its unit, nulls and sinks
beside it. Scores say where heads attend. Whether the answer needs a head is what ``ablation``, ``patching`` and
``causal`` measure.
"""
