"""A stock Hugging Face multimodal model with named activation points.

It knows architectures, activations and attention. It does not know samples' evidence, experiments or results.
"""

from mech.model.attention import AttentionCall, KeySums
from mech.model.hooked import HookedMLLM

__all__ = ["AttentionCall", "HookedMLLM", "KeySums"]
