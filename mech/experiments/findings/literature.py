"""The models on which the literature made its claims: the other half of every comparison with it.

A claim is about the models it was made on. On other models it may or may not be found again. A small model on which it
fails shows that the claim is not universal, not that it is wrong for a large one.
"""

from collections.abc import Sequence

STUDIED = {
    "2606.05843": "Qwen3-VL 4B, 8B and 32B, LLaVA-OneVision 7B, InternVL3.5 8B",
    "2608.27417": "Qwen3-VL 8B",
    "2411.10950": "LLaVA 7B",
}
ABLATED = "Qwen3-VL 4B, LLaVA-OneVision 7B"  # models whose heads arXiv 2606.05843 ablates
FASTER = "Qwen3-VL 8B and 32B, LLaVA-OneVision 7B"  # models in which it keeps them dense


def published(paper: str, models: str = "") -> str:
    """``arXiv 2608.27417, on Qwen3-VL 8B``; "" if no paper makes the claim."""
    studied = models or STUDIED.get(paper, "")
    return "" if not paper else f"arXiv {paper}, on {studied}" if studied else f"arXiv {paper}"


def in_all(verdicts: Sequence[str], agrees: str, differs: str, unit: str = "setting") -> str:
    """The overall verdict over several settings, as far as they allow one."""
    n, yes, no = len(verdicts), verdicts.count(agrees), verdicts.count(differs)
    if n == 1:
        where = f"in the one {unit} tried"
        return f"Not universal: it fails {where}." if no else f"{'Reproduced' if yes else 'Cannot tell'} {where}."
    if no:
        return f"Not universal: it fails in {no} of {n} {unit}s" + (f" and is reproduced in {yes}." if yes else ".")
    if yes == n:
        return f"Reproduced in all {n} {unit}s tried."
    if yes:
        return f"Reproduced in {yes} of {n} {unit}s; the others cannot tell."
    return f"Cannot tell: in {n} {unit}s the intervals allow both."
