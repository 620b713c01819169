"""Training for sparsity: a model, or gates and an adapter beside a frozen one, learn to do with few dense heads.

Takes a model, an objective (a row of data: what is penalised, how strongly or within which loss) and batches, gives
trained weights, gates and a curve. The local branch of a gate is the attention that ``localize`` runs, so what is
trained is what is served. What came of it is for others to measure.
"""
