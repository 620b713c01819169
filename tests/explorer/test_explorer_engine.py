"""What the page shows is what the library measures, and the code it offers gives the same numbers."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

import mech as library
from mech.explorer.state import State


def ask(engine, action, state="", **more):
    answer = engine.ask({"action": action, "state": state, **more})
    json.dumps(answer, allow_nan=False)
    return answer


def file_of(picture, kind="PNG"):
    written = io.BytesIO()
    picture.save(written, kind)
    return base64.b64encode(written.getvalue()).decode()


def test_the_scores_are_those_of_the_library(engine):
    shown = ask(engine, "show", "sample=1")
    known = library.head_scores(engine.model, [engine.samples[1]], ("ram", "gaze", "vision_mass"))
    for name in known:
        np.testing.assert_allclose(shown["scores"][name], known[name].values[0], atol=2e-5)
    ram = library.retrieval_attention_mass(engine.model, [engine.samples[1]])
    assert shown["even"] == pytest.approx(float(ram["size_null"][0]), abs=1e-6)
    assert shown["answer"] == shown["right"] == engine.samples[1].answer
    assert shown["top"][0][1] == shown["answer"] and sum(p for _, _, p in shown["top"]) <= 1
    assert [box[1:] for box in shown["evidence"]] == [[b.x0, b.y0, b.x1, b.y1] for b in engine.samples[1].evidence]


def test_another_box_is_other_evidence_and_costs_no_forward(engine, monkeypatch):
    before = ask(engine, "show", "sample=1")
    monkeypatch.setattr(engine.model, "forward", None)
    whole = ask(engine, "show", "sample=1&boxes=0:0,0,96,96")
    np.testing.assert_allclose(whole["scores"]["ram"], whole["scores"]["vision_mass"], atol=1e-5)
    assert whole["drawn"] and not before["drawn"] and whole["scores"]["ram"] != before["scores"]["ram"]


def test_a_head_attends_where_its_pattern_does(engine):
    sample = engine.samples[0]
    inputs = engine.model.inputs_of(sample)
    _, cache = engine.model.run_with_cache(inputs, names_filter=["blocks.3.attn.hook_pattern"])
    pattern = cache["blocks.3.attn.hook_pattern"][0, 5].detach().numpy()
    looks, shown = ask(engine, "head", "head=L3H5"), ask(engine, "show")
    keys = inputs.layout.positions("image")
    np.testing.assert_allclose(looks["last"], pattern[-1, keys], atol=1e-5)
    words = inputs.layout.words()
    assert list(words) == shown["words"]
    for values, rows in zip(looks["words"], words.values(), strict=True):
        np.testing.assert_allclose(values, pattern[rows][:, keys].mean(0), atol=1e-5)
    np.testing.assert_allclose(shown["tokens"]["rect"], inputs.layout.rect[keys], rtol=1e-4)


@pytest.mark.parametrize(
    "link",
    [
        "sample=2&off=L0H2,L4H1",
        "sample=2&off=L0H2,L4H1&way=zero",
        "sample=2&off=L0H2&way=resample",
        "sample=2&off=L0H2,L0H4&way=patch&head=L0H2",
        "sample=2&off=L0H2&way=patch&other=0",
        "sample=2&off=L0H2&way=patch&other=blank&boxes=0:10,10,60,60",
        "sample=2&off=L0H2,L3H1&way=pull&boxes=0:60,60,90,90&head=L3H1&word=4",
        "sample=1&question=What+number+does+the+red+frame+hold%3F&off=L0H2&head=L1H1",
        "sample=3&head=L4H2",
    ],
)
def test_the_code_gives_what_the_page_shows(engine, link):
    known: dict = {}
    exec(compile(ask(engine, "code", link)["code"], "copied", "exec"), known)
    state = State.read(link)
    if state.off:
        told = ask(engine, "change", link)
        likelihood = {token: now for token, _, _, now in told["tokens"]}
    else:
        told = ask(engine, "show", link)
        likelihood = {token: p for token, _, p in told["top"]}
    assert known["answer"] == told["answer"]
    for token, p in likelihood.items():
        assert known["probabilities"][token].item() == pytest.approx(p, abs=1e-5)
    if state.head is not None:
        looks = ask(engine, "head", link)
        seen = looks["question"] if state.word is None else looks["words"][state.word]
        keys = known["inputs"].layout.positions("image")
        np.testing.assert_allclose(known["attention"].detach()[keys], seen, atol=1e-5)


def test_changed_heads_stand_beside_random_ones(engine):
    changed = ask(engine, "change", "off=L0H2,L0H4&way=zero")
    ids = [token for token, *_ in changed["tokens"]]
    sets = ask(engine, "random", "off=L0H2,L0H4&way=zero", tokens=ids)["sets"]
    assert len(sets) == 5 and len({one["heads"] for one in sets}) > 1
    for one in sets:
        assert len(one["heads"].split(",")) == 2 and not {"L0H2", "L0H4"} & set(one["heads"].split(","))
        assert set(one["p"]) == set(ids)
    again = ask(engine, "random", "off=L0H2,L0H4&way=zero", tokens=ids)["sets"]
    assert again == sets
    model = engine.model
    first = [(int(name[1]), int(name[3])) for name in sets[0]["heads"].split(",")]
    with library.intervene(model, library.Ablate(heads=first, to="zero")) as other:
        logits = other(model.inputs_of(engine.samples[0]), logits_to_keep=1)[0, -1]
    assert logits.detach().softmax(-1)[ids[0]].item() == pytest.approx(sets[0]["p"][ids[0]], abs=1e-6)
    everything = ",".join(f"L{layer}H{head}" for layer in range(6) for head in range(8))
    assert ask(engine, "random", f"off={everything}")["sets"] == []


def test_effects_and_paths_are_those_of_the_library(engine):
    sample, model = engine.samples[0], engine.model
    metric = library.LogitDiff(sample.answer, sample.counterfactual.answer)
    known = library.activation_patching(
        model, sample, None, metric, point="attn.hook_z", over=("layer", "head"), direction="noise"
    )
    effect = ask(engine, "score", name="effect")["score"]
    np.testing.assert_allclose(effect, known["effect"].values[0], atol=1e-4)
    layer, head = np.unravel_index(np.argmax(effect), np.shape(effect))
    paths = ask(engine, "paths", f"head=L{layer}H{head}")["paths"]
    assert {path["into"] for path in paths} <= {"q", "k", "v"}
    sizes = [abs(path["effect"]) for path in paths]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 0
    edges = library.edge_attribution(model, sample, None, metric, ig_steps=0, check=0, direction="noise")
    receiver = f"L{layer}{'H' if paths[0]['into'] == 'q' else 'K'}{head}.{paths[0]['into']}"
    exact = float(edges["effect"].sel(sender=paths[0]["from"], receiver=receiver)[0])
    assert paths[0]["effect"] == pytest.approx(exact, abs=1e-5)
    writes = np.array(ask(engine, "score", name="writes")["score"])
    assert writes.shape == (6, 8) and np.abs(writes).max() > 0.1


def test_a_picture_of_the_users_is_asked_like_any_other(engine, tmp_path, monkeypatch):
    stock = engine.samples[4]
    added = ask(engine, "add", name="../../etc/my picture.png", data=file_of(stock.images[0]))
    assert added["name"] == "my picture.png"
    link = f"sample=4&picture={added['picture']}"
    shown = ask(engine, "show", link)
    assert shown["answer"] == stock.answer and shown["right"] == "" and set(shown["scores"]) == {"vision_mass"}
    box = stock.evidence[0]
    drawn = f"{link}&boxes=0:{box.x0},{box.y0},{box.x1},{box.y1}"
    with_box = ask(engine, "show", drawn)
    np.testing.assert_allclose(with_box["scores"]["ram"], ask(engine, "show", "sample=4")["scores"]["ram"], atol=1e-5)
    assert "counterfactual" in ask(engine, "paths", f"{drawn}&head=L4H2")["error"]["expected"]
    stock.images[0].save(tmp_path / "my picture.png")
    monkeypatch.chdir(tmp_path)
    known: dict = {}
    exec(ask(engine, "code", f"{drawn}&off=L0H2&way=patch&other=blank&head=L0H2")["code"], known)
    assert known["answer"] == ask(engine, "change", f"{drawn}&off=L0H2&way=patch&other=blank")["answer"]
    for _ in range(9):
        ask(engine, "add", name="other.png", data=file_of(Image.effect_noise((32, 32), 50)))
    assert "drop it again" in ask(engine, "show", link)["error"]["do"], "only the last few are kept"


def test_a_video_and_shared_keys_are_explored_too():
    from mech.explorer.engine import Engine

    samples = library.haystacks("video", n=2, seed=0)
    engine = Engine(library.HookedMLLM.from_pretrained("reference:qwen-s"), samples, samples)
    assert ask(engine, "open")["kv"] == [4] * 6
    shown = ask(engine, "show", "boxes=f2:10,10,60,60")
    assert shown["frame"] == 2 and len(shown["pictures"]) == 4 and shown["evidence"] == [[1, 10, 10, 60, 60]]
    assert set(shown["tokens"]["picture"]) == {0, 1, 2, 3}
    assert "mech.Box(10, 10, 60, 60, frame=2)" in ask(engine, "code", "boxes=f2:10,10,60,60")["code"]
    assert all(path["into"] in "qkv" for path in ask(engine, "paths", "head=L3H7")["paths"])
    known = [one["name"] for one in shown["pictures"]]
    assert not any(one["uri"] for one in ask(engine, "show", known=known)["pictures"])


BOMB = Image.new("1", (6000, 5000))


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"action": "nono"}, "open, add"),
        ({}, "the action None"),
        (["show"], "the action None"),
        (None, "the action None"),
        ({"action": "show", "state": 3}, "a state of type int"),
        ({"action": "show", "state": "sample=99"}, "sample 99 of 6"),
        ({"action": "show", "state": "picture=ab"}, "drop it again"),
        ({"action": "show", "state": "question=%20%20"}, "an empty question"),
        ({"action": "show", "state": "question=%3Cimage%3E"}, "special token"),
        ({"action": "show", "state": "boxes=0:90,90,200,200"}, "a box inside the image"),
        ({"action": "show", "state": "boxes=3:1,1,20,20"}, "image"),
        ({"action": "head", "state": ""}, "no head"),
        ({"action": "head", "state": "head=L9H0"}, "the head L9H0"),
        ({"action": "change", "state": ""}, "no heads to change"),
        ({"action": "change", "state": "off=L0H99"}, "a head of this model"),
        ({"action": "change", "state": "off=L0H1&way=patch&other=77"}, "sample 77 of 6"),
        ({"action": "random", "state": "off=L0H1", "tokens": [-1]}, "the token -1"),
        ({"action": "random", "state": "off=L0H1", "tokens": "all"}, "a few ids"),
        ({"action": "score", "state": "", "name": "ram"}, "writes or effect"),
        ({"action": "score", "state": "other=0&sample=0", "name": "effect"}, "gives the same answer"),
        ({"action": "add", "name": "a.png", "data": "%%%"}, "arrived incomplete"),
        ({"action": "add", "name": "a.png", "data": 3}, "arrived incomplete"),
        ({"action": "add", "name": "a.png", "data": ""}, "cannot be read as a picture"),
        ({"action": "add", "name": "a.png", "data": base64.b64encode(b"no picture").decode()}, "cannot be read"),
        ({"action": "add", "name": "a.gif", "data": file_of(Image.new("P", (9, 9)), "GIF")}, "of no kind that is read"),
        ({"action": "add", "name": "big.png", "data": file_of(BOMB)}, "at most 24000000 pixels"),
        (
            {"action": "add", "name": "a.png", "data": base64.b64encode(b"\0" * 12_000_001).decode()},
            "at most 12,000,000",
        ),
    ],
)
def test_bad_requests_are_told_what_to_do(engine, request_, said):
    answer = engine.ask(request_)
    assert list(answer) == ["error"] and said in " ".join(answer["error"].values())
