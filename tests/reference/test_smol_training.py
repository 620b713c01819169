"""The training of ``reference:smol`` on a language model of a few thousand weights: what it learns from, and how."""

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mech.data import answers
from mech.data.haystacks import draw_scene
from mech.reference.smol import base, language, tower
from mech.reference.smol.adapter import DOWN, UP, adapt, merge
from mech.reference.smol.language import Phase, batch_of, dialogue, drift, embedded, train_language
from mech.reference.smol.steps import Checkpoint, learning_rate
from mech.reference.smol.words import CELLS, Turn, Vocabulary, turns


@pytest.fixture(scope="module")
def words():
    return base.tokenizer(base.find())


@pytest.fixture(scope="module")
def vocabulary(words):
    return Vocabulary(words)


def small(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False)


@pytest.mark.parametrize("n_digits", [1, 3])
@pytest.mark.parametrize("domain", ["grounding", "documents", "pages"])
def test_every_visual_token_shows_what_is_drawn_there(words, vocabulary, domain, n_digits):
    scene = draw_scene(domain, random.Random(5), 5, "train", n_digits=n_digits)
    shown = vocabulary.shown(scene)
    assert len(shown) == CELLS**2 * len(scene.canvas)
    for item in scene.items:
        row = (item.picture * CELLS + item.y // 16) * CELLS
        line = shown[row : row + CELLS]
        if domain == "grounding":
            cells = line[item.x // 16 :][:n_digits]
            assert words.decode([word for word, _ in cells]) == item.number
            assert words.decode([cells[0][1]]) == f" {item.key}" and {second for _, second in cells[1:]} <= {-1}
        else:
            text = words.decode([word for word, _ in line])
            assert text.split() == [f"{item.key}:", item.number] or text.replace(" ", "") == f"{item.key}:{item.number}"
            # The first digit stands in the cell in which it is drawn.
            assert words.decode([line[(item.x + 4) // 16][0]]) == item.number[0]
    blank = [word for word, _ in shown].count(vocabulary.blank)
    assert blank >= len(shown) - 5 * CELLS


def test_a_dialogue_is_what_the_chat_template_writes_with_words_in_the_pictures_place(words, vocabulary):
    scene = draw_scene("documents", random.Random(1), 4, "train", n_digits=3)
    asked = [Turn("Who scored 417?", "Noor", "name"), Turn("List.", " Anna417 Ben230", "list")]
    row = dialogue(vocabulary, shown := vocabulary.shown(scene), asked)
    messages = []
    for turn in asked:
        messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
    messages[0]["content"] = [{"type": "image"}, {"type": "text", "text": asked[0].question}]
    whole = words.apply_chat_template(messages, tokenize=False)
    before, after = (words(part, add_special_tokens=False).input_ids for part in whole.split("<image>"))
    assert row.ids == [*before, *(word for word, _ in shown), *after]
    assert words.decode(learned(row)) == "Noor<|im_end|>417230"
    ((kind, where),) = row.answers
    assert kind == "name" and words.decode([row.ids[i] for i in where]) == "Noor<|im_end|>"


def test_questions_are_those_of_the_haystacks_and_every_item_is_asked_for_once():
    scene = draw_scene("grounding", random.Random(2), 6, "train", n_digits=3)
    asked = turns(scene, random.Random(3), 4)
    assert sorted(turn.kind == "list" for turn in asked) == [False] * 4 + [True]
    (listed,) = [turn for turn in asked if turn.listed]
    assert sum(f" {item.key}{item.number}" in listed.answer for item in scene.items) == 2
    for turn in asked:
        if not turn.listed:
            known = [
                question.format(key=item.key, number=item.number)
                for item in scene.items for question in answers.QUESTIONS[turn.kind]["grounding"]
                if answers.answer_to(turn.kind, "grounding", item.key, item.number) == turn.answer
            ]  # fmt: skip
            assert turn.question in known


def test_scenes_are_listed_first_and_asked_about_from_the_second_phase_on(vocabulary, monkeypatch):
    phases = (
        Phase(2, asked=0, scenes=2, digits=(1,), domains={"documents": 1.0}),
        Phase(1, asked=2, scenes=1, digits=(3,), domains={"grounding": 1.0}),
    )
    monkeypatch.setattr(language, "PHASES", phases)
    assert [batch_of(vocabulary, step)[0] for step in range(3)] == ["documents", "documents", "grounding"]
    steps = [batch_of(vocabulary, step)[1] for step in range(5)]
    assert [len(rows) for rows in steps] == [2, 2, 1, 1, 1]  # after the last phase it goes on as in it
    assert [len(row.answers) for rows in steps for row in rows] == [0] * 4 + [2] * 3
    for rows in steps[:2]:
        assert all(sum(row.learned) >= 2 and set(learned(row)) <= set(vocabulary.digit) for row in rows)


def learned(row):
    return [token for token, is_learned in zip(row.ids, row.learned, strict=True) if is_learned]


def test_the_rate_rises_stays_and_falls_to_nothing():
    rates = [language.rate(step, language.STEPS) for step in range(language.STEPS + 1)]
    still = slice(language.WARM_UP, language.STEPS - language.ANNEALED)
    assert set(rates[still]) == {language.RATE} == {max(rates)} and rates[-1] == 0 < rates[0]
    assert rates[: language.WARM_UP] == sorted(rates[: language.WARM_UP])
    assert rates[still.stop :] == sorted(rates[still.stop :], reverse=True)


def test_a_colour_is_added_to_the_digit_that_it_frames(vocabulary):
    table = torch.randn(49152, 8)
    step = next(step for step in range(20) if batch_of(vocabulary, step)[0] == "grounding")
    _, rows = batch_of(vocabulary, step)
    found, row = embedded(table, rows, 0.0), rows[0]
    framed = [position for position, second in enumerate(row.second) if second >= 0]
    assert framed and {row.second[position] for position in framed} <= set(vocabulary.colours)
    for position, (word, second) in enumerate(zip(row.ids, row.second, strict=True)):
        assert torch.allclose(found[0, position], table[word] + (table[second] if second >= 0 else 0))
    noisy = embedded(table, rows, 0.5)[0] - found[0]
    share = noisy[: len(row.ids)].norm(dim=-1) / found[0, : len(row.ids)].norm(dim=-1)
    assert 0.4 < share.mean() < 0.6


def test_merged_adapters_are_what_ran_beside_the_weights():
    plain, tuned = small(), small()
    adapters = adapt(tuned, rank=3)
    for name, parameter in adapters.items():
        if name.endswith(UP):
            parameter.data.normal_(std=0.3)
    assert {name.rpartition(".")[2] for name in adapters} == {UP, DOWN}
    weights = plain.state_dict()
    before = {name: value.clone() for name, value in weights.items()}
    merge(weights, adapters.state_dict())
    ids = torch.randint(49152, (2, 7))
    moved = {name for name in weights if not torch.equal(weights[name], before[name])}
    assert moved == {f"{name.removesuffix('.' + UP)}.weight" for name in adapters if name.endswith(UP)}
    with torch.no_grad():
        merged, beside = plain(ids).logits, tuned(ids).logits
        assert torch.allclose(merged, beside, atol=0.02 * merged.abs().max().item())  # frozen weights are in bfloat16
        for name, value in before.items():
            plain.state_dict()[name].copy_(value)
        assert not torch.allclose(plain(ids).logits, beside, atol=0.1 * merged.abs().max().item())


def test_drift_is_nothing_before_tuning_and_something_after():
    model = small()
    adapters, ids = adapt(model, rank=2), list(range(30))
    assert drift(model, ids).item() == pytest.approx(0, abs=1e-6)
    for parameter in adapters.values():
        parameter.data += 0.5
    assert drift(model, ids).item() > 1e-3


def trained(folder, vocabulary, steps, monkeypatch):
    model = small()
    torch.manual_seed(1)
    adapters = adapt(model, rank=2)
    curve = train_language(model, adapters, vocabulary, folder / "language.pt", steps, say=lambda text: None)
    return adapters.state_dict(), curve


def test_an_interrupted_tuning_ends_in_the_same_weights(vocabulary, tmp_path, monkeypatch):
    monkeypatch.setattr(language, "EVERY", 2)
    monkeypatch.setattr(language, "PHASES", (Phase(2, asked=0, scenes=2), Phase(2, asked=2, scenes=2)))
    # A run that is cut short would come to rest where it ends.
    monkeypatch.setattr(language, "rate", lambda step, steps: learning_rate(step, 4, 1e-3, warm_up=2))
    whole, curve = trained(tmp_path / "whole", vocabulary, 4, monkeypatch)
    trained(tmp_path / "parts", vocabulary, 2, monkeypatch)
    parts, again = trained(tmp_path / "parts", vocabulary, 4, monkeypatch)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert [entry["step"] for entry in curve] == [entry["step"] for entry in again] == [2, 4]


def test_a_tower_learns_to_show_the_words(vocabulary, tmp_path, monkeypatch):
    from mech.reference.smol.train import eyes

    monkeypatch.setattr(tower, "SCENES", 4)
    monkeypatch.setattr(tower, "EVERY", 5)
    monkeypatch.setattr(tower, "FITTED", 5)
    torch.manual_seed(0)
    table = torch.randn(49152, 32)
    sight, projector = eyes(LlamaConfig(hidden_size=32))
    curve = tower.train_tower(sight, projector, vocabulary, table, tmp_path / "tower.pt", 30, lambda text: None)
    # The last five steps weigh the loss in another way.
    assert curve[-2]["loss"] < 0.8 * curve[0]["loss"]
    assert curve[-1]["right"] > curve[0]["right"] and curve[-1]["distance"] < curve[0]["distance"]


def test_targets_tell_every_word_and_every_framed_digit_apart(vocabulary):
    targets = tower.Targets(vocabulary, torch.randn(49152, 64))
    scenes = tower.scenes_of(random.Random(0), 6, "train")
    labels = targets.labels(vocabulary, scenes)
    loss, nearest, distance = targets.loss(targets.vectors[labels], labels, 8.0, 1.0)
    assert nearest.all() and distance.abs() < 1e-4 and loss < 0.1
    wrong, nearest, distance = targets.loss(targets.vectors[(labels + 1) % len(targets.vectors)], labels, 8.0, 1.0)
    assert not nearest.any() and distance > 0.5 and wrong > loss
    assert len(targets.vectors) == len(set(vocabulary.single)) + 10 * 12


def test_a_checkpoint_gives_back_what_was_saved(tmp_path):
    module = torch.nn.Linear(2, 2)
    kept = Checkpoint(tmp_path / "one.pt", module=module)
    kept.save(7, loss=0.123456)
    other = torch.nn.Linear(2, 2)
    again = Checkpoint(tmp_path / "one.pt", module=other)
    assert again.step == 7 and again.curve == kept.curve and again.curve[0]["loss"] == 0.1235
    assert torch.equal(other.weight, module.weight)
    assert not list(tmp_path.glob("*.part"))
