"""One engine for all tests of the explorer."""

import pytest


@pytest.fixture(scope="session")
def engine():
    import mech as library
    from mech.explorer.engine import Engine
    from mech.explorer.state import Origin

    reference, samples = library.haystacks("grounding", n=12, seed=3).split(0.5)
    made = Origin('mech.HookedMLLM.from_pretrained("reference:llava-s")', 'mech.haystacks("grounding", n=12, seed=3)')
    found = Engine(library.HookedMLLM.from_pretrained("reference:llava-s"), samples, reference, made)
    found.warm()
    return found
