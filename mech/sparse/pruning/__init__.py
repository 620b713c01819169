"""Heads removed for good: a smaller checkpoint for plain ``transformers``, and what it saves and costs.

Takes a model and the heads to remove; returns a model without their weights and a report of size, speed and accuracy.
Which heads to remove is the caller's choice: see ``mech.experiments.causal``.
"""
