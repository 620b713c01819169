"""Architectures as data: where in a stock Hugging Face model every activation is.

    family_of(hf_model).text.attn        # ("self_attn",)

Takes a model or its config, gives a ``Family`` (module paths) and a ``ModelConfig`` (sizes). A new architecture is a
row in ``rows``. The folder does not know how a point is hooked, nor how pictures become tokens.
"""
