"""Display in Jupyter: ``Shown`` gives a class the picture that ``mech.view`` draws of it.

Samples, layouts, inputs, rankings, circuits and causal reports must not import the views, which build on them; so the
view is looked up by its name, and only when a notebook asks for HTML. Printing still uses ``repr``.
"""

from importlib import import_module

VIEWS = "mech.views"


class Shown:
    """A value with a picture, drawn when it is the last line of a notebook cell."""

    def _repr_html_(self) -> str:
        return import_module(VIEWS).view(self)._repr_html_()
