"""LoRA (arXiv 2106.09685) on the attention of any supported model: trained on frozen weights, merged for serving.

    lora = Lora.fresh(model, rank=8)
    with lora.attached(model): ...          # W x + B A x, with a gradient for A and B
    with lora.merged(model): ...            # W + B A in the weights, and W again afterwards
    lora.save("sparse")                     # as PEFT writes it: PeftModel.from_pretrained(hf_model, "sparse") opens it

It adapts the projections of the text stack's attention: queries, keys, values and output.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mech.errors import OutputError, UnsupportedModel
from mech.files import make_folder, parse_json, read, write
from mech.model import HookedMLLM
from mech.model.architectures.families import layers_of, part_at
from mech.model.hook_sites import attention_of
from mech.model.named.projections import is_stock

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
_PREFIX, _DOWN, _UP = "base_model.model.", "lora_A.weight", "lora_B.weight"


@dataclass(frozen=True, eq=False)
class Lora:
    """Two low-rank matrices for each adapted projection; their product is added to its weight.

    Attributes:
        rank: the inner dimension of the product.
        weights: ``MODULE.lora_A.weight`` (rank x d_in) and ``MODULE.lora_B.weight`` (d_out x rank), by name.
        model: name of the model it was trained on.
    """

    rank: int
    weights: dict[str, nn.Parameter] = field(repr=False)
    model: str = ""

    @classmethod
    def fresh(cls, model: HookedMLLM, rank: int, seed: int = 0) -> "Lora":
        """A new adapter, which changes nothing yet: B is zero.

        Raises:
            UnsupportedModel: weights that are quantized, offloaded or adapted already.
        """
        generator, weights = torch.Generator().manual_seed(seed), {}
        for name, module in projections(model).items():
            d_out, d_in = module.weight.shape
            down = torch.randn(rank, d_in, generator=generator) / d_in**0.5
            weights[f"{name}.{_DOWN}"] = nn.Parameter(down.to(model.device))
            weights[f"{name}.{_UP}"] = nn.Parameter(torch.zeros(d_out, rank, device=model.device))
        return cls(rank, weights, str(model.name))

    def change(self, name: str) -> Float[Tensor, "d_out d_in"]:
        """``B A`` of a projection."""
        return self.weights[f"{name}.{_UP}"] @ self.weights[f"{name}.{_DOWN}"]

    @contextmanager
    def attached(self, model: HookedMLLM) -> Iterator[None]:
        """While open, adapted projections return ``W x + B A x``."""

        def beside(name: str, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            down, up = self.weights[f"{name}.{_DOWN}"], self.weights[f"{name}.{_UP}"]
            return output + ((args[0].to(down) @ down.T) @ up.T).to(output)

        with ExitStack() as hooks:
            for name, module in self._found(model).items():
                hooks.callback(module.register_forward_hook(partial(beside, name)).remove)
            yield

    @contextmanager
    def merged(self, model: HookedMLLM) -> Iterator[None]:
        """While open, ``B A`` is added to the weights; afterwards they are restored bit for bit."""
        modules = self._found(model)
        before = {name: module.weight.detach().clone() for name, module in modules.items()}
        try:
            with torch.no_grad():
                for name, module in modules.items():
                    module.weight += self.change(name).to(module.weight)
            yield
        finally:
            with torch.no_grad():
                for name, module in modules.items():
                    module.weight.copy_(before[name])

    def save(self, folder: str | Path) -> Path:
        """Write it in PEFT's format: a config and safetensors.

        Raises:
            OutputError: the folder cannot be written.
        """
        folder = Path(folder)
        make_folder(folder)
        names = [name.removesuffix(f".{_UP}") for name in self.weights if name.endswith(_UP)]
        config = {"peft_type": "LORA", "base_model_name_or_path": self.model, "r": self.rank, "lora_alpha": self.rank,
                  "lora_dropout": 0.0, "bias": "none", "target_modules": names, "inference_mode": True}  # fmt: skip
        write(folder / CONFIG, json.dumps(config, indent=1), "\n")
        stored = {f"{_PREFIX}{name}": weight.detach().float().cpu() for name, weight in self.weights.items()}
        try:
            save_file(stored, folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{folder} cannot be written ({error})", "room for the weights", "make room") from error
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Lora":
        """Read what ``save`` wrote.

        Raises:
            OutputError: no such files, or something else in them.
        """
        folder = Path(folder)
        try:
            config: Any = parse_json(read(folder / CONFIG))
            stored = load_file(folder / WEIGHTS)
            rank, model = int(config["r"]), str(config.get("base_model_name_or_path") or "")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise OutputError(f"{folder} holds no adapter ({error})", f"{CONFIG} and {WEIGHTS} of Lora.save") from error
        weights = {name.removeprefix(_PREFIX): nn.Parameter(value) for name, value in stored.items()}
        return cls(rank, weights, model)

    def _found(self, model: HookedMLLM) -> dict[str, nn.Linear]:
        """The projections it adapts.

        Raises:
            UnsupportedModel: the model lacks them, or their shapes differ.
        """
        found = projections(model)
        names = {name.removesuffix(f".{_UP}") for name in self.weights if name.endswith(_UP)}
        for name in names:
            shape = (len(self.weights[f"{name}.{_UP}"]), self.weights[f"{name}.{_DOWN}"].shape[1])
            if name not in found or tuple(found[name].weight.shape) != shape:
                raise UnsupportedModel(
                    f"an adapter of {self.model or 'another model'} for {model.name}, which has no {name} of {shape}",
                    "the model it was trained beside", "open that model",
                )  # fmt: skip
        return {name: module for name, module in found.items() if name in names}


def projections(model: HookedMLLM) -> dict[str, nn.Linear]:
    """The linear layers of the text stack's attention, by their name in the Hugging Face model.

    Raises:
        UnsupportedModel: weights that are quantized, offloaded or already adapted.
    """
    stack, names = model.family.text, {id(module): name for name, module in model.hf_model.named_modules()}
    found: dict[str, nn.Linear] = {}
    for layer, block in enumerate(layers_of(model.hf_model, stack)):
        attention = attention_of(block, stack)
        if attention is None:
            continue
        for path in dict.fromkeys((stack.q, stack.k, stack.values or stack.v, stack.o)):
            module = part_at(attention, path)
            if module is None:
                continue
            if not isinstance(module, nn.Linear) or not is_stock(module) or not module.weight.is_floating_point():
                raise UnsupportedModel(
                    f"{model.name} with a {type(module).__name__} for {path} of layer {layer}",
                    "plain weights in floating point", "open it without quantization, or train gates alone (rank=0)",
                )  # fmt: skip
            found[names[id(module)]] = module
    return found
