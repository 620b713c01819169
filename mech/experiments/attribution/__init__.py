"""Estimates by gradients, and what heads write: attribution of nodes, edges and inputs; logit attribution; lenses.

Takes a model, inputs and a metric, gives an estimate of every cell of a patching sweep from a few forwards and
backwards, or reads activations as words. An estimate has to be confirmed by ``patching`` or ``paths``.
"""
