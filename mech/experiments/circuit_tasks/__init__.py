"""Circuit localisation as a benchmark: tasks, circuits as graphs of edges, and how faithful a circuit is.

Takes a model, samples with counterfactuals and entries that score every edge, gives CPR, CMD and, where the truth is
planted, the AUROC over edges, as the circuit track of MIB does for text (arXiv 2504.13151). Circuits are read from and
written to MIB's JSON. Which edges matter is for ``paths`` and ``attribution`` to say; here entries are compared.
"""
