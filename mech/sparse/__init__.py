"""Sparse inference from a head ranking: a few heads attend to everything, the others to the first tokens and nearby.

    fast = mech.localize(model, dense_heads=ranking.top(0.05), sinks=4, window=256)

``policy`` says who sees what and what that saves at best, ``masks`` defines it, ``kernels`` and ``cache`` make it fast
and small, ``localize`` puts it into a model. ``card`` and ``step`` are for GPUs: their kernels, and a step of
generation that a CUDA graph can hold. ``expect`` predicts whether a length gains.
"""
