"""Metrics called on logits, as those of TransformerLens' patching are."""

from dataclasses import replace

import pytest
import torch
import xarray as xr

from mech.data.haystacks import haystacks
from mech.errors import ExperimentError
from mech.experiments.attribution.nodes import attribution
from mech.experiments.metrics import KL, LogitDiff, LogProb, OfLogits, Probability, Rank
from mech.experiments.patching.activation import activation_patching
from mech.model import HookedMLLM
from mech.reference import tiny, tiny_processors

LOGITS = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(0))
LAST = LOGITS[:, -1]


def test_a_metric_of_logits_reads_the_last_position_of_each_row():
    torch.testing.assert_close(LogitDiff(4, 7)(LOGITS), LAST[:, 4] - LAST[:, 7])
    torch.testing.assert_close(
        LogitDiff([4, 5, 6], [7, 8, 9])(LOGITS), LAST[[0, 1, 2], [4, 5, 6]] - LAST[[0, 1, 2], [7, 8, 9]]
    )
    torch.testing.assert_close(LogProb(4)(LOGITS), LAST.log_softmax(-1)[:, 4])
    torch.testing.assert_close(Probability(4)(LOGITS), LAST.softmax(-1)[:, 4])
    torch.testing.assert_close(Rank(4)(LOGITS), (LAST[:, 4:5] < LAST).sum(-1).float())
    other = LOGITS.roll(1, 0)
    p, q = LOGITS[:, -1].log_softmax(-1), other[:, -1].log_softmax(-1)
    torch.testing.assert_close(KL()(other, clean=LOGITS), (p.exp() * (p - q)).sum(-1))


def test_texts_are_read_with_the_models_tokenizer():
    model = HookedMLLM.from_hf(tiny.model("llava"), tiny_processors.processor("llava"))
    logits = model(model.inputs("What is here?"))
    right, wrong = (model.processor.answer_ids(text) for text in ("red", "blue"))
    assert right[0] != wrong[0]
    found = LogitDiff("red", "blue")(logits, model=model)
    torch.testing.assert_close(found, logits[:, -1, right[0]] - logits[:, -1, wrong[0]])


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: LogitDiff("red", "blue")(LOGITS), "'red' without a tokenizer"),
        (lambda: KL()(LOGITS), "KL of one run's logits"),
        (lambda: LogitDiff(4, 7)(LAST), "logits \\[batch pos vocab\\]"),
        (lambda: LogitDiff(4, 7)("logits"), "LogitDiff of str"),
        (lambda: LogitDiff(4, 4)(LOGITS), "do not differ"),
        (lambda: LogitDiff([4], [7])(LOGITS), "1 answers for example 2"),
    ],
)
def test_what_cannot_be_read_off_logits_is_refused(call, says):
    with pytest.raises(ExperimentError, match=says):
        call()


def test_a_function_of_logits_is_a_metric_wherever_one_is_asked_for():
    model = HookedMLLM.from_hf(tiny.model("llava"), tiny_processors.processor("llava"))
    sample = haystacks("documents", 1, seed=3)[0]
    clean, corrupted = model.inputs_of(sample), model.inputs_of(sample.counterfactual)
    right, wrong = 4, 7
    known = LogitDiff(right, wrong)

    def difference(logits):
        return logits[:, -1, right] - logits[:, -1, wrong]

    for measure in (activation_patching, attribution):
        expected = measure(model, clean, corrupted, known)
        found = measure(model, clean, corrupted, difference)
        assert "difference" in found.attrs["measure"] and "0x" not in found.attrs["measure"]
        xr.testing.assert_allclose(found, expected)
    with pytest.raises(ExperimentError, match=r"Tensor of shape \(\) from OfLogits(.|\n)*a number for each row"):
        activation_patching(model, clean, corrupted, lambda logits: logits[0, -1, right])
    with pytest.raises(ExperimentError, match=r"metric='logit'(.|\n)*a function of logits(.|\n)*LogitDiff"):
        activation_patching(model, clean, corrupted, "logit")
    torch.testing.assert_close(OfLogits(lambda logits: logits[:, -1, 4])(LOGITS), LAST[:, 4])


def test_answers_that_share_their_first_tokens_are_patched_where_they_part():
    """417 against 412: both runs are given "41", and every cell is what a forward of its own gives there."""
    model = HookedMLLM.from_hf(tiny.model("llava").double(), tiny_processors.processor("llava"))
    sample = haystacks("documents", 1, seed=3, answer="number")[0]
    right, wrong = (model.processor.answer_ids(one.answer) for one in (sample, sample.counterfactual))
    fork = next(i for i, (a, b) in enumerate(zip(right, wrong, strict=True)) if a != b)
    assert fork > 0
    forced = replace(sample.counterfactual, answer=sample.answer)
    clean, corrupted = (model.inputs_of(one, answer=True) for one in (sample, forced))
    metric = LogitDiff(sample.answer, sample.counterfactual.answer)
    for direction, base, source in (("noise", clean, corrupted), ("denoise", corrupted, clean)):
        found = activation_patching(model, clean, corrupted, metric, direction=direction)
        assert found.attrs["algorithm"] == "wavefront"
        _, cache = model.run_with_cache(source, names_filter="blocks.1.attn.hook_z")

        def write(z, hook, kept=cache["blocks.1.attn.hook_z"]):
            z[:, :, 0] = kept[:, :, 0]
            return z

        with torch.no_grad(), model.hooks([("blocks.1.attn.hook_z", write)]):
            at = model(base)[0, base.layout.spans["answer"][fork] - 1]
        expected = float(at[right[fork]] - at[wrong[fork]])
        assert found["metric"].sel(layer=1, head=0).item() == pytest.approx(expected, abs=1e-6)
    unforced = [model.inputs_of(one) for one in (sample, sample.counterfactual)]
    with pytest.raises(ExperimentError, match="inputs with the answer"):
        activation_patching(model, *unforced, metric)
