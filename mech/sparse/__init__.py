"""Sparse inference from a head ranking: a few heads attend to everything, the others to the first tokens and nearby.

    fast = mech.localize(model, dense_heads=ranking.top(0.05), sinks=4, window=256)

``policy`` says which heads see what and what that saves at best, ``masks`` defines it, ``kernels`` and ``cache`` make
it fast and small, ``localize`` applies it to a model. ``card`` and ``step`` are for GPUs: their kernels, and a
generation step that a CUDA graph can capture. ``expect`` predicts whether a policy gains at a given length.
"""
