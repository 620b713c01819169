"""On which models the literature made its claims: the other half of every comparison with it.

A claim is about the models that it was made on. Measured on other models it can be found again, or not; a small model
on which it fails shows that it is not universal, not that it is wrong of a large one.
"""

from collections.abc import Sequence

STUDIED = {
    "2606.05843": "Qwen3-VL 4B, 8B and 32B, LLaVA-OneVision 7B, InternVL3.5 8B",
    "2608.27417": "Qwen3-VL 8B",
    "2411.10950": "LLaVA 7B",
}
ABLATED = "Qwen3-VL 4B, LLaVA-OneVision 7B"  # of arXiv 2606.05843, where heads were ablated
FASTER = "Qwen3-VL 8B and 32B, LLaVA-OneVision 7B"  # where they were kept dense


def published(paper: str, models: str = "") -> str:
    """``arXiv 2608.27417, on Qwen3-VL 8B``; "" for what no paper claims."""
    studied = models or STUDIED.get(paper, "")
    return "" if not paper else f"arXiv {paper}, on {studied}" if studied else f"arXiv {paper}"


def in_all(verdicts: Sequence[str], agrees: str, differs: str, unit: str = "setting") -> str:
    """What the verdicts of several settings come to, no more than they can."""
    n, yes, no = len(verdicts), verdicts.count(agrees), verdicts.count(differs)
    if n == 1:
        where = f"in the one {unit} that was tried"
        return f"Not universal: it fails {where}." if no else f"{'Found again' if yes else 'Cannot tell'} {where}."
    if no:
        return f"Not universal: it fails in {no} of {n} {unit}s" + (f" and is found again in {yes}." if yes else ".")
    if yes == n:
        return f"Found again in all {n} {unit}s that were tried."
    if yes:
        return f"Found again in {yes} of {n} {unit}s; the others cannot tell."
    return f"Cannot tell: in {n} {unit}s the intervals allow both."
