"""Samples with evidence: questions about images and videos, and where in them the answer is.

Knows pixels, frames, pages and text. Knows nothing of tokens, models or experiments.
"""
