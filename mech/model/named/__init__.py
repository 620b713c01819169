"""The model under the names TransformerLens gives its weights and tokens: ``model.W_O[3, 5]``, ``to_tokens``.

Takes the Hugging Face model inside and gives tensors; nothing is folded, centred or changed. ``projections`` says what
a module is as a linear map (adapters included), ``weights`` gives the maps their names, ``norms`` says what a norm is
at one point, ``tokens`` turns texts into tokens and back. The folder knows no hook and runs no forward of the model.
"""
