"""Gradient estimates, and what heads write: attribution of nodes, edges and inputs; logit attribution; lenses.

Takes a model, inputs and a metric, and estimates every cell of a patching sweep from a few forwards and backwards, or
reads activations as words. Estimates have to be confirmed by ``patching`` or ``paths``.
"""
