"""What the papers on retrieval heads claim, or leave open: each point compared with what your own model says.

    claims = published_claims(model, mech.haystacks("grounding", 64))
    print(*claims.sentences(), sep="\\n")            # twelve sentences, computed
    claims["low-ranked"].numbers                    # what a sentence was made from
    claims                                          # a table, in Jupyter

Nine points are weaknesses of arXiv 2606.05843 (June 2026), three are disputes between it and related papers: how heads
are ablated, which rows score them, and in which phase they are masked. Each is one function of a ``Bench`` (a model,
samples that find heads, others that test them, and what was measured so far), and returns a ``Point``: numbers with
their intervals, and one sentence made from them, whichever way they turn out. ``verdict`` says whether this model
agrees with the published statement, differs from it, or cannot tell; ``published`` names the models it was made on.

Run one by itself: ``published_claims(model, samples, only="low-ranked")``.

This does not repeat the papers' own experiments on their models. A statement that fails on a small model is not
universal; it may hold on a large one, which is why it should be measured there.
"""

from mech.papers.bench import Bench, Point
from mech.papers.claims import KNOWN, Claims, published_claims
from mech.papers.tags import tag_leak

__all__ = ["KNOWN", "Bench", "Claims", "Point", "published_claims", "tag_leak"]
