"""A model's weights and tokens under the names TransformerLens gives them: ``model.W_O[3, 5]``, ``to_tokens``.

Tensors are read from the Hugging Face model inside; nothing is folded, centred or changed. ``projections`` reads a
module as a linear map (adapters included), ``weights`` names these maps, ``norms`` gives a norm as the linear map it is
at one point, and ``tokens`` turns text into tokens and back. This folder knows no hooks and runs no forward of the
model.
"""
