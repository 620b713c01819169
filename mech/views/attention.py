"""Attention between tokens, head by head, in the viewer that TransformerLens users know (circuitsvis).

    view(token_attention(model, inputs, layers=[3]))     # at most 64 groups of tokens: text, and cells of the picture

The viewer shows all heads of a layer small and the one pointed at or chosen large, with the keys that each query
attends to. circuitsvis' own notebook code asks the network which copy of its script to use; here its local script is
put into the page, so there is no request and the page is complete. It is drawn on white, even on a dark page.
"""

import re

import numpy as np
import xarray as xr

from mech.axes import HEAD, LAYER
from mech.errors import OutputError
from mech.views.drawing.page import View, escape, tabs

MOST = 64  # groups on a side: 8 heads of 600 x 600 are 57 MB of JSON


def attention_view(result: xr.DataArray, title: str = "Attention between tokens") -> View:
    """Attention patterns over (layer, head, query, key), a panel for each layer.

    Args:
        result: the result of ``mech.token_attention``.
        title: heading of the view, and title of a saved page.

    Raises:
        OutputError: other dimensions, or more groups than can be shown.
    """
    dims = (LAYER, HEAD, "query", "key")
    if set(result.dims) != set(dims) or result.sizes["key"] > MOST or result.sizes["query"] != result.sizes["key"]:
        raise OutputError(
            f"attention over {dict(result.sizes)}", f"{', '.join(dims)}; at most {MOST} queries and {MOST} keys",
            "use mech.token_attention(model, inputs, layers=[...]), which groups tokens",
        )  # fmt: skip
    array = result.transpose(*dims)
    names = [str(name).strip().replace(" ", "·") for name in array["key"].values]  # the viewer drops spaces
    panels, calls, code = {}, [], ""
    for layer, values in zip(array[LAYER].values.tolist(), array.values, strict=True):
        heads = [f"L{layer}H{head}" for head in array[HEAD].values.tolist()]
        panels[f"layer {layer}"], code, call = _viewer(values, names, heads)
        calls.append(call)
    note = (
        "Rows attend to columns. A picture's tokens are grouped in cells (row, column): the attention on all of a "
        "cell's tokens, averaged over the tokens of the row. Unit: attention mass, 0 to 1."
    )
    script = f'<script type="module">{code}{"".join(calls)}</script>'
    body = f"<h3>{escape(title)}</h3><p class=soft>{note}</p>{tabs(panels, 'layer')}{script}"
    return View(title, body, height=1400)


def _viewer(values: np.ndarray, names: list[str], heads: list[str]) -> tuple[str, str, str]:
    """From circuitsvis' local source: the element, the script (the same for all), and the call that draws into it."""
    from circuitsvis.attention import attention_heads  # imports torch

    source = attention_heads(
        attention=np.round(values, 4), tokens=names, attention_head_names=heads, max_value=float(values.max()),
        min_value=0.0, mask_upper_tri=False,
    ).local_src  # fmt: skip
    code, draws, call = source.partition("CircuitsVis.render(")
    match = re.match(r'<div id="([\w-]+)".*?<script[^>]*>', code, re.DOTALL)
    if match is None or not draws:
        raise OutputError("a version of circuitsvis with different pages", "circuitsvis 1.43", "install that version")
    code = re.sub(r"//# sourceMappingURL=\S+", "", code[match.end() :])
    # The call contains users' tokens: "<" would end the script, or open a comment in it.
    call = draws + call.rpartition("</script>")[0].replace("<", "\\u003c") + ";"
    return f'<div class="viewer" id="{match[1]}"></div>', code, call
