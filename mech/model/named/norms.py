"""A norm as the linear map it is at one point.

``frozen_norm`` replaces folding: with its scale fixed at a given input, a norm is a linear map, so parts of the
residual stream can be passed through it one by one and still sum to what the model computed.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def frozen_norm(
    norm: Callable[[Tensor], Tensor], stream: Float[Tensor, "*batch d_model"]
) -> Callable[[Tensor], Tensor]:
    """The linear map that a norm is at ``stream``, with its own weight and the scale it has there.

    Works for every norm of the form ``weight * (x - centre * mean(x)) / scale(x) + bias``, whatever its weight is
    called (Gemma adds one to it) and whether it centres (LayerNorm) or not (RMSNorm): these are found by probing.

    Returns:
        A function of parts of the stream, ``[... *batch d_model]``; the parts of ``stream`` sum to ``norm(stream) -
        bias``.
    """
    wide = torch.promote_types(stream.dtype, torch.float32)
    ones = torch.ones_like(stream[..., :1, :].reshape(-1, stream.shape[-1])[:1])
    signs = ones.clone()
    signs[:, 1::2] = -1
    # ``signs`` has mean zero and mean square one; times 1e3, the epsilon inside the norm vanishes.
    # The norm may be on another device than the stream; everything is then moved to the stream's device.
    at = {"device": stream.device, "dtype": wide}
    weight = ((norm(signs * 1e3) - norm(signs * -1e3)).to(**at) / 2 * signs).reshape(-1)
    bias = ((norm(signs * 1e3) + norm(signs * -1e3)).to(**at) / 2).reshape(-1)
    plain = norm(ones * 1e3).to(**at).reshape(-1)
    centred = bool((plain - bias).norm() < 0.5 * weight.norm())

    def spread(parts: Tensor) -> Tensor:
        parts = parts.to(**at)
        return weight * (parts - parts.mean(-1, keepdim=True) if centred else parts)

    normed = norm(stream).to(**at) - bias
    scale = spread(stream).norm(dim=-1, keepdim=True) / normed.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return lambda parts: (spread(parts) / scale).to(parts.dtype)
