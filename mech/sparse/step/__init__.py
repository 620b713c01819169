"""Decoding at fixed shapes: a one-token step that a CUDA graph can capture, for localized models and their dense twin.

``clock`` keeps the positions on the device, ``fixed`` keeps keys and values in stores that never move, ``graph``
captures the step, ``loop`` generates with it in place of Hugging Face's loop.
"""
