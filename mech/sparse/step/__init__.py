"""Decoding at fixed shapes: one token's step that a CUDA graph can hold, for localized models and their dense twin.

``clock`` keeps the positions on the device, ``fixed`` the keys and values in stores that never move, ``graph`` captures
the step, ``loop`` generates with it in place of Hugging Face's loop.
"""
