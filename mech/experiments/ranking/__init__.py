"""From a score per head to sets of heads: rankings, cut-offs, random and layer-matched controls, agreement.

Takes scores (example, layer, head), gives a ``Ranking``, named sets of heads, and how far rankings agree across scores,
domains, seeds and sizes. It needs no model but to refuse one that does not fit, and does not know what a score means.
"""
