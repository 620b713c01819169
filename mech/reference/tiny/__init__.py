"""A tiny model with random weights of every supported family, with its processor: made in a moment, offline.

    models.model("qwen3_vl")             # a stock Hugging Face model of three layers
    processors.processor("qwen3_vl")     # its own image processor at a tiny size, and a byte-level tokenizer

What tests and ``mech check --all`` try the laws on. Nothing here is trained: what such a model answers means nothing.
"""
