"""The explorer in a notebook: the page's script as an anywidget, which talks to the engine over the kernel's channel.

    shown = mech.explore(model, samples)      # shows itself
    shown.state, shown.code                   # what is shown now, and Python that reproduces it

Works where anywidget does: Jupyter, VS Code, Colab, marimo. No port is opened.
"""

from functools import cache
from typing import Any

from mech.arguments import checked
from mech.data.samples import Samples, SomeSamples
from mech.explorer.assets import needs, static
from mech.explorer.engine import Engine
from mech.explorer.state import State
from mech.model import HookedMLLM


@checked
def explore(model: HookedMLLM, samples: SomeSamples, *, reference: SomeSamples | None = None, link: str = "") -> Any:
    """A widget that explores a model on some samples.

    Args:
        model: a hooked model.
        samples: the samples to choose from, besides pictures that are dropped in.
        reference: other samples, from which mean and resample ablation take their replacements; by default
            ``samples`` themselves.
        link: what is shown first, as the page writes it after ``#``.

    Returns:
        An ``anywidget.AnyWidget`` whose ``state`` is the ``State`` shown, and ``code`` the Python that reproduces it.

    Raises:
        OutputError: anywidget is not installed.
        InputError: a link that the explorer does not understand.

    Cost: one forward per reference sample at the first mean or resample ablation.
    """
    needs("anywidget")
    State.read(link)
    engine = Engine(model, Samples(samples), Samples(samples if reference is None else reference))
    return _widget()(engine, link)


@cache
def _widget() -> type:
    """The widget class; made when first needed, since anywidget comes with an extra."""
    import anywidget
    import traitlets

    class Explorer(anywidget.AnyWidget):
        """A widget whose messages are the engine's requests, each with a number that its answer carries too."""

        _esm = static("explorer.js")
        _css = static("explorer.css")
        link = traitlets.Unicode("").tag(sync=True)

        def __init__(self, engine: Engine, link: str):
            super().__init__(link=link)
            self.engine = engine
            self.on_msg(self._asked)

        @property
        def state(self) -> State:
            return State.read(self.link)

        @property
        def code(self) -> str:
            return self.engine.code(self.state)

        def _asked(self, _: Any, content: Any, buffers: Any) -> None:
            number = content.get("number") if isinstance(content, dict) else None
            request = content.get("request") if isinstance(content, dict) else None
            self.send({"number": number, "answer": self.engine.ask(request)})

    return Explorer
