"""The script that makes the reference models, on a toy recipe: resumable, deterministic, and what it keeps can be
opened."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mech import reference
from mech.data.haystacks import LONG, MOST, PICTURES
from mech.errors import OutputError, UnsupportedModel
from mech.model import HookedMLLM
from mech.reference import train as script
from mech.reference.recipe import RECIPES
from mech.reference.train import TOKENS, Shape, learning_rate

TOY = replace(
    RECIPES["llava-s-seed1"],
    text=dict(RECIPES["llava-s"].text, hidden_size=32, intermediate_size=32, num_hidden_layers=1),
    vision=dict(RECIPES["llava-s"].vision, num_hidden_layers=1, hidden_size=32, intermediate_size=32),
    batch=2, tower_steps=2, steps=5, keep=(3, 4),
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the toy trained in one go, one trained with an interruption, and one that goes on from the toy."""
    folders = [tmp_path_factory.mktemp(name) for name in ("whole", "resumed")]
    with pytest.MonkeyPatch.context() as patch:
        grown = replace(TOY, start="toy", longest=288, tower_steps=0, steps=2, keep=())
        patch.setattr(script, "RECIPES", {"toy": TOY, "longer": grown})
        patch.setattr(script, "EVERY", 1)
        patch.setattr(script, "held_out_accuracy", lambda *_, **__: 0.0)
        patch.setattr(reference, "FOLDER", folders[0])
        quiet = dict(say=lambda line: None)
        script.train("toy", folders[0], **quiet)
        script.train("toy", folders[1], steps=3, **quiet)
        script.train("toy", folders[1], **quiet)
        script.train("longer", folders[0], **quiet)
        with pytest.raises(OutputError, match="follows another recipe"):
            script.RECIPES["toy"] = replace(TOY, seed=5)
            script.train("toy", folders[1], **quiet)
        yield folders


def test_an_interrupted_training_ends_in_the_same_weights(trained):
    for file in ("model.safetensors", "step3.safetensors", "step4.safetensors"):
        whole, resumed = (load_file(folder / "toy" / file) for folder in trained)
        assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_kept_checkpoints_open_by_revision_with_the_same_vision_tower(trained):
    assert reference.names() == ("longer", "toy")
    assert reference.revisions("toy") == ("step3", "step4") and reference.revisions("longer") == ()
    final, main, early = (HookedMLLM.from_pretrained("reference:toy", revision=r) for r in (None, "main", "step3"))
    kept = load_file(reference.checkpoint("reference:toy", "step3"))
    states = [dict(model.hf_model.named_parameters()) for model in (final, main, early)]
    for key, value in states[2].items():
        assert torch.equal(states[0][key], states[1][key])
        if "vision_tower" in key:
            assert key not in kept and torch.equal(value, states[0][key])
        else:
            assert torch.equal(value, kept[key].float()) and value.dtype == torch.float32
    moved = "model.language_model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(states[0][moved], states[2][moved])
    assert early.hf_model.lm_head.weight is early.hf_model.get_input_embeddings().weight
    assert early.name == "reference:toy"


def test_what_is_not_there_is_refused_by_name(trained):
    for name, revision, says in (
        ("toy", "step5", "step3, step4"),
        ("longer", "step3", "ships without checkpoints"),
        ("tow", None, "use 'reference:toy'"),
    ):
        with pytest.raises(UnsupportedModel, match=says):
            HookedMLLM.from_pretrained(f"reference:{name}", revision=revision)


def test_cards_say_how_a_model_was_made(trained):
    card, longer = reference.card("toy"), reference.card("longer")
    assert card["steps"] == 5 and card["seed"] == TOY.seed and [row["step"] for row in card["curve"]] == [1, 2, 3, 4, 5]
    assert [row["stage"] for row in card["curve"]] == ["tower"] * 2 + ["answers"] * 3
    assert set(card["checkpoints"]) == {"step3", "step4"} and "longer" not in card
    assert longer["start"] == "toy" and [row["visual_tokens"] for row in longer["longer"]] == [72, 144, 288]


def test_scenes_grow_to_the_length_of_the_recipe_and_batches_shrink():
    recipe = RECIPES["qwen-long"]
    shapes = [Shape.at(step, recipe) for step in range(recipe.steps)]
    tokens = [shape.n_pictures * TOKENS[shape.domain] if shape.domain in LONG else 0 for shape in shapes]
    assert max(tokens[: recipe.steps // 10]) < recipe.longest / 4
    assert 0.8 * recipe.longest < max(tokens[recipe.steps // 2 :]) <= recipe.longest
    for shape in shapes:
        assert 1 <= shape.n_items <= MOST[shape.domain] and shape.n_pictures >= PICTURES[shape.domain]
        assert shape.domain != "video" or shape.n_pictures % 2 == 0
        pictures = recipe.batch * PICTURES[shape.domain]  # of a batch at the default length
        assert shape.size == 2 or shape.size * shape.n_pictures == pytest.approx(pictures, rel=0.25)
    assert Shape.at(3000, RECIPES["llava-s"]).n_pictures in (1, 3)


def test_the_learning_rate_rises_twice_and_falls_to_a_fiftieth():
    recipe = RECIPES["llava-s"]
    rates = [learning_rate(step, recipe) for step in range(recipe.steps)]
    assert (
        max(rates[: recipe.tower_steps]) == recipe.tower_rate and max(rates[recipe.tower_steps :]) == recipe.peak_rate
    )
    for last, peak in ((recipe.tower_steps - 1, recipe.tower_rate), (recipe.steps - 1, recipe.peak_rate)):
        assert rates[last] == pytest.approx(0.02 * peak, rel=0.01)
