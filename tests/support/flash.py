"""Torch's flash kernel written out, with its own signature: what the code around it can be tested against on a CPU."""

import torch


class Twin:
    """``torch.ops.aten._flash_attention_forward``, literally; ``calls`` keeps what it was given."""

    def __init__(self):
        self.calls = []

    def __call__(
        self, query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
        scale=None, window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None,
        num_splits=None,
    ):  # fmt: skip
        assert (dropout_p, return_debug_mask, alibi_slopes, block_table) == (0.0, False, None, None)
        self.calls.append((query, key, value))
        sides = (window_size_left, 0 if is_causal else window_size_right)
        if cum_seq_q is None:
            assert (query.shape[1], key.shape[1]) == (max_q, max_k)
            parts = [self.one(q, k, v, scale, sides) for q, k, v in zip(query, key, value, strict=True)]
            z, share = (torch.stack(x) for x in zip(*parts, strict=True))
        else:
            assert cum_seq_q.dtype == cum_seq_k.dtype == seqused_k.dtype == torch.int32
            parts = []
            for row, used in enumerate(seqused_k.tolist()):
                own = slice(int(cum_seq_q[row]), int(cum_seq_q[row + 1]))
                keys = slice(int(cum_seq_k[row]), int(cum_seq_k[row]) + used)
                assert own.stop - own.start <= max_q and int(cum_seq_k[row + 1] - cum_seq_k[row]) <= max_k
                parts.append(self.one(query[own], key[keys], value[keys], scale, sides))
            z, share = torch.cat([z for z, _ in parts]), torch.cat([share for _, share in parts], dim=1)
        nothing = torch.empty(0)
        return z, share, nothing, nothing, nothing

    @staticmethod
    def one(q, k, v, scale, sides):
        """One sequence: [pos head d_head]; the last row stands at the last key."""
        q, (k, v) = q.float(), (x.float().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        row = torch.arange(len(q))[:, None] + len(k) - len(q)
        left, right = (float("inf") if side is None or side < 0 else side for side in sides)
        key = torch.arange(len(k))
        scores = scores.masked_fill((key < row - left) | (key > row + right), float("-inf"))
        share = scores.logsumexp(-1)
        z = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        return z.to(v.dtype), share


def on_card(monkeypatch, twin=None, float32=True):
    """Let tensors of the CPU pass for those of a card, whose flash kernel is ``twin``; gives the twin."""
    from mech.sparse.card import choice, flash

    twin = Twin() if twin is None else twin

    class Kernel:
        def __call__(self, *args, **options):
            given = args[0]
            z, *rest = twin(*args, **options)
            return (z.to(given.dtype), *rest)

    monkeypatch.setattr(flash, "on_card", lambda x: True)
    monkeypatch.setattr(flash, "lacking", lambda q: "" if q.dtype in flash._HALF else "not in half precision")
    monkeypatch.setattr(flash, "_kernel", Kernel())
    monkeypatch.setattr(choice, "_failed", {})
    monkeypatch.setattr(choice, "_said", set())
    if float32:
        monkeypatch.setattr(flash, "_HALF", (torch.float32, torch.float16, torch.bfloat16))
    return twin
