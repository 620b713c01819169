"""What the assembled model can do: held-out questions about pictures, and plain text."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from mech.data.haystacks import haystacks
from mech.inputs import Processor, build, collate


@torch.no_grad()
def held_out_accuracy(
    model: Any, processor: Processor, domain: str, answer: str = "digit", n: int = 300, seed: int = 9
) -> float:
    """The share of held-out questions (unseen handwriting, fullest scenes) that greedy decoding answers right.

    Every token of the answer, and the end after it, must be the likeliest one after the tokens before: then greedy
    decoding would have written it. This takes one forward.
    """
    samples, right = haystacks(domain, n, seed, answer=answer), 0
    end = torch.tensor([processor.tokenizer.eos_token_id])
    size = 10
    for i in range(0, n, size):
        rows = [build(processor, s.question, images=s.images, answer=s.answer) for s in samples[i : i + size]]
        inputs = collate(rows, processor.pad_token_id)
        longest = max(len(layout.spans["answer"]) for layout in inputs.layouts) + 1
        # Rows are padded on the left, so that all answers end in the last column.
        logits = model(**inputs.tensors, logits_to_keep=longest).logits
        for row, layout in enumerate(inputs.layouts):
            at = torch.as_tensor(layout.positions("answer"))
            said = logits[row, -len(at) - 1 :].argmax(-1)
            right += torch.equal(said, torch.cat([inputs.tensors["input_ids"][row, at], end]))
    return round(right / n, 4)


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, texts: Sequence[str], length: int = 256) -> float:
    """``exp`` of the mean cross-entropy of the first tokens of each text, from the second token on."""
    losses = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[:, :length]
        logits = model(input_ids=ids).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    return round(math.exp(torch.cat(losses).mean()), 3)


def sample_of_text() -> list[str]:
    """English that no stage was trained on: what scikit-learn says about its data sets."""
    from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine

    sets: tuple[Any, ...] = (load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine)
    return [str(load().DESCR) for load in sets]
