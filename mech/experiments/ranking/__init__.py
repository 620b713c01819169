"""From a score per head to sets of heads: rankings, cut-offs, random and layer-matched controls, agreement.

Takes scores over (example, layer, head). Returns a ``Ranking``, named sets of heads, and how well rankings agree across
scores, domains, seeds and sizes. A model is needed only to refuse one that does not match; what a score means is not
known here.
"""
