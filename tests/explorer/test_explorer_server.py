"""The page is for this machine alone: who does not name it, or lacks the token, gets nothing."""

import json
import socket

import pytest

from mech.errors import OutputError

testclient = pytest.importorskip("starlette.testclient", reason="the extra: pip install 'mech[explore]'")
TOKEN, PORT = "a-token", 8123
HOME = f"http://127.0.0.1:{PORT}"


class Echo:
    """An engine that says what it was asked."""

    def ask(self, request):
        return {"asked": request}


@pytest.fixture(scope="module")
def client():
    from mech.explorer.server import application

    return testclient.TestClient(application(Echo(), TOKEN, PORT), base_url=HOME)


def post(client, what, token=TOKEN, **headers):
    return client.post(f"/{token}/ask", content=what, headers={"content-type": "application/json", **headers})


def test_who_has_the_token_gets_the_page_and_answers(client):
    page = client.get(f"/{TOKEN}/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "http" not in page.text.replace("http-equiv", ""), "nothing from elsewhere"
    for name in ("page.js", "explorer.js", "explorer.css"):
        assert client.get(f"/{TOKEN}/{name}").status_code == 200
    for headers in ({}, {"origin": HOME}, {"host": f"localhost:{PORT}"}):
        assert post(client, json.dumps({"action": "open"}), **headers).json() == {"asked": {"action": "open"}}


@pytest.mark.parametrize("path", ["/", "/wrong/", "/wrong/explorer.js", f"/{TOKEN}x/", f"/{TOKEN}", f"/{TOKEN}/../x",
                                  f"/{TOKEN}/state.py", f"/{TOKEN}/ask"])  # fmt: skip
def test_other_addresses_say_nothing(client, path):
    answer = client.get(path, follow_redirects=False)
    assert answer.status_code == 403 and TOKEN not in answer.text and "content-security-policy" in answer.headers


@pytest.mark.parametrize(
    ("headers", "token"),
    [
        ({}, "wrong"),
        ({}, ""),
        ({"host": "evil.example"}, TOKEN),  # DNS rebinding: a name of theirs that leads to this machine
        ({"host": f"evil.example:{PORT}"}, TOKEN),
        ({"host": "127.0.0.1"}, TOKEN),
        ({"origin": "https://evil.example"}, TOKEN),
        ({"origin": "null"}, TOKEN),
        ({"origin": "http://127.0.0.1:9999"}, TOKEN),
    ],
)
def test_strangers_are_refused(client, headers, token):
    assert post(client, "{}", token, **headers).status_code == 403
    if "origin" not in headers:
        assert client.get(f"/{token}/", headers=headers).status_code == 403


def test_what_is_no_request_is_refused(client):
    from mech.explorer.server import MOST_BODY

    assert post(client, "{").status_code == 400
    assert post(client, "[" * 200 + "]" * 200).status_code == 400
    assert post(client, b"\xff").status_code == 400
    assert client.post(f"/{TOKEN}/ask", data={"action": "open"}).status_code == 415
    assert post(client, b" " * (MOST_BODY + 1)).status_code == 413


def test_a_port_that_is_taken_is_told_before_a_model_is_opened(mech, monkeypatch):
    from mech.explorer import server
    from mech.model import HookedMLLM

    monkeypatch.setattr(HookedMLLM, "from_pretrained", None)
    with server.listening() as place:
        port = place.getsockname()[1]
        assert place.getsockname()[0] == "127.0.0.1"
        code, _, said = mech("explore", "reference:llava-s", "--port", str(port))
    assert code == 2 and f"port {port} cannot be used" in said and "leave --port out" in said
    code, _, said = mech("explore", "--port", "99999")
    assert code == 2 and "--port 99999" in said
    code, _, said = mech("explore", "--state", "nonsense=3")
    assert code == 2 and "'nonsense' in a link" in said
    monkeypatch.undo()
    code, _, said = mech("explore", "reference:lava-s")
    assert code == 2 and "reference:llava-s" in said
    code, _, said = mech("explore", "--data", "no-such-set")
    assert code == 2 and "neither a file nor a published set" in said


def test_the_command_prints_an_address_and_serves(mech, monkeypatch):
    from mech.explorer import server

    served = {}

    def run(engine, place, token, fragment):
        served.update(engine=engine, address=server.address(place.getsockname()[1], token, fragment))
        place.close()

    monkeypatch.setattr(server, "serve", run)
    code, _, _ = mech("explore", "--samples", "6", "--domain", "documents", "--state", "sample=2")
    assert code == 0 and served["address"].startswith("http://127.0.0.1:") and served["address"].endswith("/#sample=2")
    assert len(served["address"].split("/")[3]) >= 20, "a token that cannot be guessed"
    engine = served["engine"]
    assert len(engine.samples) == 3 and engine.samples.domains == ("documents",)
    made = {}
    exec(engine.ask({"action": "code", "state": "sample=2"})["code"], made)
    assert (
        made["samples"].digest() == engine.samples.digest() and made["reference"].digest() == engine.reference.digest()
    )


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    from mech.explorer import assets, server

    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    with pytest.raises(OutputError, match=r"pip install 'mech\[explore\]'"):
        server.listening()


def test_the_socket_is_of_this_machine_only():
    from mech.explorer.server import listening

    with listening() as place, socket.socket() as other:
        other.settimeout(1)
        own = socket.gethostbyname(socket.gethostname())
        if not own.startswith("127."):
            assert other.connect_ex((own, place.getsockname()[1])) != 0
