"""Architectures as data: where every activation sits in a stock Hugging Face model.

    family_of(hf_model).text.attn        # ("self_attn",)

From a model or its config it builds a ``Family`` (module paths) and a ``ModelConfig`` (sizes). A new architecture is a
row in ``rows``. This folder does not know how a point is hooked or how pictures become tokens.
"""
