"""Experiments: head scores, rankings, ablations, and the statistics that say how certain they are.

Works with models, samples and interventions, and returns labelled results. Knows nothing about figures or pages.
"""
