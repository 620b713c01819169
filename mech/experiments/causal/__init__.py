"""The causal report: every head's RAM next to its causal effect, with intervals, tests, sets and paths.

Takes a model, held-out samples with counterfactuals and a ranking, and returns effects of single heads in both
directions, quadrants, the smallest sets on which the answer depends, and how they act. It draws nothing.
"""
