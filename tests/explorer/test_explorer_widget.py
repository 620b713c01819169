"""The explorer in a notebook: the engine's answers as messages of a widget."""

import pytest

import mech as library
from mech.errors import InputError
from mech.explorer.state import State

pytest.importorskip("anywidget", reason="the extra: pip install 'mech[explore]'")


@pytest.fixture
def shown(engine):
    return library.explore(engine.model, engine.samples, reference=engine.reference, link="sample=2&head=L0H2")


def test_a_message_is_answered_with_its_number(shown, monkeypatch):
    sent = []
    monkeypatch.setattr(type(shown), "send", lambda self, content, buffers=None: sent.append(content))
    shown._handle_custom_msg({"number": 7, "request": {"action": "head", "state": shown.link}}, [])
    shown._handle_custom_msg("nonsense", [])
    assert sent[0]["number"] == 7 and len(sent[0]["answer"]["last"]) == 36
    assert "error" in sent[1]["answer"] and sent[1]["number"] is None


def test_it_knows_what_it_shows(shown):
    assert shown.state == State(sample=2, head=(0, 2))
    shown.link = "sample=1"
    assert "samples[1]" in shown.code and "import mech" in shown.code
    known = {"model": shown.engine.model, "samples": shown.engine.samples}
    exec(shown.code, known)
    assert known["answer"] == shown.engine.ask({"action": "show", "state": "sample=1"})["answer"]
    assert "export default" in shown._esm and ".mech-explorer" in shown._css


def test_a_broken_link_is_refused(engine):
    with pytest.raises(InputError, match="'sampel' in a link"):
        library.explore(engine.model, engine.samples, link="sampel=2")
