"""Scores for ranking heads: Retrieval Attention Mass, related scores from the literature, and their controls.

Takes a model and samples with evidence, and returns a score for every (example, layer, head) with its unit, nulls and
sinks. Scores say where heads attend. Whether the answer needs a head is measured by ``ablation``, ``patching`` and
``causal``.
"""
