"""Samples with evidence: questions about images and videos, and where in them the answer is.

Works on pixels, frames, pages and text, and depends on no tokens, models or experiments.
"""
