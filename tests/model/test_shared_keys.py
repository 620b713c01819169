"""Attention to shared and own keys is attention to all of them, by the fused kernels and written out."""

import pytest
import torch
from torch import nn

from mech.model.partial.shared_keys import over_shared, written_out

N, ROWS, SHARED, WIDTH, SCALE = 5, 6, 17, 8, 0.3
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}


def case(heads, kv_heads, rows, dtype):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(N, heads, rows, WIDTH, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, kv_heads, SHARED, WIDTH, generator=generator, dtype=torch.float64)
    own = torch.randn(2, N, kv_heads, rows, WIDTH, generator=generator, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype), tuple(own.to(dtype))


def by_definition(q, k, v, own, seen):
    """Keys and values repeated for every variant, in double precision."""
    whole = [torch.cat((x.expand(N, -1, -1, -1), mine), 2).double() for x, mine in zip((k, v), own, strict=True)]
    attend = nn.functional.scaled_dot_product_attention
    return attend(q.double(), *whole, attn_mask=seen, scale=SCALE, enable_gqa=True).transpose(1, 2)


def behind(rows):
    return torch.arange(SHARED + rows) <= torch.arange(SHARED, SHARED + rows)[:, None]


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_both_ways_are_attention_to_all_keys(heads, kv_heads, rows, dtype):
    given = case(heads, kv_heads, rows, dtype)
    expected = by_definition(*given, behind(rows))
    close = {"atol": CLOSE[dtype], "rtol": CLOSE[dtype]}
    torch.testing.assert_close(over_shared(*given, SCALE).double(), expected, **close)
    torch.testing.assert_close(written_out(*given, behind(rows), SCALE).double(), expected, **close)


@pytest.mark.parametrize("at", [[ROWS - 1], [0, 3]])
def test_queries_at_some_of_the_own_positions(at):
    q, k, v, own = case(4, 2, ROWS, torch.float64)
    expected = by_definition(q, k, v, own, behind(ROWS))[:, at]
    torch.testing.assert_close(over_shared(q[:, :, at], k, v, own, SCALE, torch.tensor(at)), expected)


def test_any_mask_is_written_out_and_a_row_that_sees_nothing_is_zero():
    q, k, v, own = case(4, 2, ROWS, torch.float64)
    seen = torch.rand(ROWS, SHARED + ROWS, generator=torch.Generator().manual_seed(1)) < 0.5
    seen[2] = False
    expected = by_definition(q, k, v, own, seen).nan_to_num()
    torch.testing.assert_close(written_out(q, k, v, own, seen, SCALE), expected)
    assert not expected[:, 2].any()


def test_values_of_another_width_have_no_kernel():
    q, k, v, own = case(4, 2, ROWS, torch.float32)
    assert over_shared(q, k, torch.cat((v, v), -1), own, SCALE) is None
