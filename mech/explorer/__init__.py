"""``mech explore``: explore a model with the mouse: where a head attends, what happens without it, the code for both.

    mech explore reference:llava-s            # a page on this machine
    mech.explore(model, samples)              # the same in a notebook

``state``: what is shown, as a link and as Python. ``runs``: one question about one picture, read once. ``engine``:
answers what the page asks, JSON in and JSON out, however that travels. ``server`` (starlette, uvicorn) and ``widget``
(anywidget) carry it to the same script, ``static/explorer.js``. Both come with the extra ``mech[explore]``.

It measures nothing that the library does not measure; for samples, intervals and tests see ``mech study``.
"""
