"""Training for sparsity: a whole model, or gates and an adapter on a frozen one, learn to need few dense heads.

Takes a model, an objective (a row of data: what is penalised, and how strongly or up to which loss) and batches;
returns trained weights, gates and a training curve. The local branch of a gate is the attention that ``localize``
runs, so the model is trained as it will be served. It does not evaluate the result.
"""
