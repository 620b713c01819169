"""Experiments: scores of heads, rankings, ablations, and the statistics that say how sure they are.

Knows models, samples and interventions, and hands on labelled results. Knows nothing of pictures and pages.
"""
