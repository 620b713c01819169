"""A state is a link and back, and a link of somebody else's is read without trust."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mech.data.regions import Box
from mech.errors import InputError
from mech.explorer.state import SCORES, WAYS, Origin, State

HEAD = st.tuples(st.integers(0, 99), st.integers(0, 99))
SIDE = st.integers(0, 500)
BOX = st.builds(
    lambda x, y, w, h, k, video: Box(x, y, x + w + 1, y + h + 1, **{"frame" if video else "image": k}),
    SIDE, SIDE, SIDE, SIDE, st.integers(0, 5), st.booleans(),
)  # fmt: skip
STATES = st.builds(
    State,
    sample=st.integers(0, 999),
    picture=st.sampled_from(["", "0123456789abcdef"]),
    question=st.text(st.characters(codec="utf-8"), max_size=30),
    boxes=st.lists(BOX, max_size=3).map(tuple),
    off=st.lists(HEAD, max_size=4, unique=True).map(tuple),
    way=st.sampled_from(WAYS),
    other=st.sampled_from(["counterfactual", "blank", "7"]),
    head=st.none() | HEAD,
    word=st.none() | st.integers(0, 20),
    score=st.sampled_from(SCORES),
    against=st.sampled_from(SCORES),
)


@settings(max_examples=80, deadline=None)
@given(STATES)
def test_a_link_gives_its_state_back_and_the_code_is_python(state):
    assert State.read(state.link()) == state
    assert State.read("#" + state.link()) == state
    compile(
        state.as_python(Origin("open_model()", "make_samples()", pictures={"0123456789abcdef": 'a"\n.png'})),
        "s",
        "exec",
    )


def test_what_is_as_at_the_start_is_left_out():
    assert State().link() == ""
    assert State(sample=3, off=((0, 2), (4, 1)), way="zero").link() == "sample=3&off=L0H2,L4H1&way=zero"
    assert State.read("off=L0H2,L0H2").off == ((0, 2),)


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ("sampl=3", "use 'sample'"),
        ("sample=x", "copy the link again"),
        ("sample=-1", "at least 0"),
        ("head=L0", "copy the link again"),
        ("head=", "copy the link again"),
        ("off=L0H2;L1H3", "copy the link again"),
        ("way=off", "'mean' or 'zero'"),
        ("other=../x", "'blank'"),
        ("boxes=0:5,5,5,5", "copy the link again"),
        ("boxes=0:nan,5,6,7", "copy the link again"),
        ("score=rom", "'ram' or 'gaze'"),
        ("question=" + 3000 * "a", "2000 characters"),
    ],
)
def test_a_broken_link_is_refused(link, said):
    with pytest.raises(InputError) as error:
        State.read(link)
    assert said in str(error.value)
