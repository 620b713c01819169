"""``mech explore``: a model under the mouse. Where a head attends, what happens without it, and the code for both.

    mech explore reference:llava-s            # a page on this machine
    mech.explore(model, samples)              # the same in a notebook

``state``: what is shown, as a link and as Python. ``runs``: one question of one picture, read once. ``engine``: answers
what the page asks, JSON in and JSON out; it knows nothing of how that travels. ``server`` (starlette, uvicorn) and
``widget`` (anywidget) carry it to the same script, ``static/explorer.js``. Both come with the extra ``mech[explore]``.

It measures nothing that the library does not measure: for samples, intervals and tests see ``mech study``.
"""
