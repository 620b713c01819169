"""bfloat16 and float16: the laws hold within the precision, and measurements are those of float32 but for rounding."""

import numpy as np
import pytest
import torch
from tiny_models import opened

from mech.experiments.attention.mass import attention_mass
from mech.experiments.scores.ram import evidence_mass
from mech.model import HookedMLLM
from mech.model.check.laws import LAWS, make_batches
from mech.reference import tiny_processors

# Plain, DeepStack and M-RoPE, post-norms and windows.
CASES = [("llava", torch.bfloat16), ("llava", torch.float16), ("qwen3_vl", torch.bfloat16), ("gemma3", torch.float16)]
# Cross attention, convolutions, linear attention, a softcap. Not experts: where rounding decides, others are chosen.
OTHERS = [("mllama", torch.bfloat16), ("lfm2_vl", torch.bfloat16), ("qwen3_5", torch.bfloat16),
          ("paligemma2", torch.float16)]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), [*CASES, *OTHERS])
def test_the_laws_hold_within_the_precision(name, dtype):
    model = opened(name, dtype)
    batches = make_batches(model)
    for law in LAWS:
        with torch.no_grad():
            findings = list(LAWS[law](model, batches))
        assert any(finding.ok for finding in findings)
        assert [(law, finding) for finding in findings if finding.ok is False] == []


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_masses_are_those_of_full_precision_but_for_rounding(name, dtype):
    picture = tiny_processors.noise(16, 16)
    found = {}
    for precision in (torch.float32, dtype):
        model = opened(name, precision)
        if precision == torch.float32:  # the weights that the half-precision model has
            model.hf_model.to(dtype).to(torch.float32)
        inputs = model.inputs("Which digit?", images=[picture])
        keys = inputs.layout.positions("image")[:2]
        rows = evidence_mass(model, inputs, [keys])[0][0, 0].numpy()
        every = attention_mass(model, inputs, {"evidence": keys}, queries="question")
        found[precision] = rows, every.sel(set="evidence").values[0]
    # Rounding differs most where early layers' errors have grown, so the first layer is held to more.
    for half, full in zip(found[dtype], found[torch.float32], strict=True):
        np.testing.assert_allclose(half[0], full[0], atol=0.02)
        assert abs(half - full).mean() < 0.03
    np.testing.assert_allclose(*found[dtype], atol=0.02)


def test_the_laws_hold_with_weights_of_8_bits():
    """Needs the extra ``quant``; narrow models cannot have 4 bits on a CPU."""
    pytest.importorskip("bitsandbytes")
    model = HookedMLLM.from_pretrained("reference:llava-s", quantization="8bit")
    batches = make_batches(model)
    with torch.no_grad():
        found = [
            finding for law in ("parity", "meaning", "padding", "generation") for finding in LAWS[law](model, batches)
        ]
    assert found and [finding for finding in found if finding.ok is False] == []
