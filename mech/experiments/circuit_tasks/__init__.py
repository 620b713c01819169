"""Circuit localisation as a benchmark: tasks, circuits as graphs of edges, and how faithful a circuit is.

Takes a model, samples with counterfactuals and entries that score every edge, and returns CPR, CMD and, if the true
edges are planted, the AUROC over edges, as the circuit track of MIB does for text (arXiv 2504.13151). Circuits are read
from and written to MIB's JSON. Finding the edges that matter is the job of ``paths`` and ``attribution``; this folder
compares entries.
"""
