"""A stock Hugging Face multimodal model with named activation points.

Knows architectures, activations and attention. Knows nothing of samples' evidence, experiments or results.
"""

from mech.model.attention import AttentionCall, KeySums
from mech.model.hooked import HookedMLLM

__all__ = ["AttentionCall", "HookedMLLM", "KeySums"]
