"""Generation by a step of fixed shapes, in place of Hugging Face's loop: the host only launches, and rarely waits.

    given["custom_generate"] = Loop(owner)          # what Hugging Face's generate then runs, everything prepared

The prompt is read as usual, in one forward or in chunks, into a ``SplitCache``; what it leaves moves into stores of
fixed size, and from there on every token is the same ``Step``, one CUDA graph on a GPU. Tokens are chosen on the
device, by the generation's logits processors; every ``LOOK`` tokens the host checks whether all rows have ended, and
surplus tokens are cut off.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from mech.errors import ExperimentError
from mech.sparse.cache import SplitCache, SplitLayer
from mech.sparse.masks import Near
from mech.sparse.step.clock import Shape
from mech.sparse.step.fixed import FixedCache, pins_of
from mech.sparse.step.graph import Captured

LOOK = 8  # tokens between two checks whether all rows have ended
ROUND = 256  # room is a multiple of it, so that prompts of nearby lengths share a step


class Uncaptured(UserWarning):
    """Why a generation on a GPU runs without a CUDA graph, or does not take the step that was requested."""


class Step:
    """One token through the model: its inputs, stores and logits keep their addresses from token to token.

    Args:
        hf_model: the Hugging Face model.
        inputs: its inputs for the token after the prompt.
        cache: the stores.
        capture: whether to capture the step in a CUDA graph.
    """

    def __init__(self, hf_model: Any, inputs: dict[str, Any], cache: FixedCache, capture: bool):
        self.hf_model, self.cache, self.left = hf_model, cache, 0
        self.inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        self.captured = False
        self._run: Callable[[], Tensor] = self.forward
        self.addresses = _addresses(hf_model)
        if capture:
            self._capture()

    def _capture(self) -> None:
        try:
            self._run, self.captured = Captured(self.forward), True
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # an operation that no graph can capture: a family's, or quantized weights'
            said = str(error).strip().splitlines()[0]
            warnings.warn(f"the step could not be captured ({said}): it runs uncaptured", Uncaptured, stacklevel=2)

    def fits(self, hf_model: Any, inputs: dict[str, Any], shape: Shape) -> bool:
        """Whether another run can use it: the same shape, matching inputs, and weights at the same addresses."""
        alike = inputs.keys() == self.inputs.keys() and all(
            value.shape == self.inputs[name].shape if isinstance(value, Tensor) else value == self.inputs[name]
            for name, value in inputs.items()
        )
        return alike and shape == self.cache.clock.shape and _addresses(hf_model) == self.addresses

    def load(self, inputs: dict[str, Any], split: SplitCache, near: Near, mask: Tensor | None) -> None:
        """Set the step to the end of a prompt; see ``FixedCache.load``."""
        self.left = self.cache.clock.shape.room - split.get_seq_length()
        self.cache.load(split, near, mask)
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                self.inputs[name].copy_(value)

    def __call__(self, token: Int[Tensor, "batch 1"]) -> Float[Tensor, "batch vocab"]:
        """The logits after one more token of every row; they overwrite the last ones.

        Raises:
            ExperimentError: the stores are full.
        """
        if not self.left:
            raise ExperimentError(
                f"one token more than the {self.cache.clock.shape.room} reserved positions",
                "no more than prompt and max_new_tokens", "generate again with a larger max_new_tokens",
            )  # fmt: skip
        self.left -= 1
        self.inputs["input_ids"].copy_(token)
        return self._run()

    def forward(self) -> Float[Tensor, "batch vocab"]:
        """The forward that is captured."""
        self.cache.clock.begin()
        out = self.hf_model(**self.inputs, past_key_values=self.cache, use_cache=True, return_dict=True)
        self.inputs["position_ids"] += 1
        self.cache.clock.advance()
        return out.logits[:, -1]


@dataclass
class Written:
    """The tokens of a generation so far, and which rows continue; all of it on the device."""

    ids: Int[Tensor, "batch pos"]
    length: int
    settings: Any
    processors: Any
    criteria: Any
    alive: Int[Tensor, " batch"] = field(init=False)
    kept: Int[Tensor, ""] = field(init=False)

    @classmethod
    def behind(cls, ids: Int[Tensor, "batch pos"], settings: Any, processors: Any, criteria: Any) -> "Written":
        """Start from a prompt."""
        room = ids.new_zeros(len(ids), criteria.max_length)
        room[:, : ids.shape[1]] = ids
        made = cls(room, ids.shape[1], settings, processors, criteria)
        made.alive, made.kept = ids.new_ones(len(ids)), ids.new_zeros(())
        return made

    def choose(self, logits: Float[Tensor, "batch vocab"]) -> Int[Tensor, "batch 1"]:
        """The next token of every row, as Hugging Face's loop chooses it; padding where a row has ended."""
        self.kept += self.alive.amax()
        scores = self.processors(self.ids[:, : self.length], logits.to(copy=True, dtype=torch.float32))
        if self.settings.do_sample:
            token = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)[:, 0]
        else:
            token = scores.argmax(-1)
        if any(isinstance(criterion, EosTokenCriteria) for criterion in self.criteria):
            padding = self.settings._pad_token_tensor.to(token.device)
            token = token * self.alive + padding * (1 - self.alive)
        self.ids[:, self.length] = token
        self.length += 1
        self.alive &= ~self.criteria(self.ids[:, : self.length], None)
        return token[:, None]

    @property
    def full(self) -> bool:
        return self.length == self.ids.shape[1]

    def sequences(self, prompt: int) -> Int[Tensor, "batch pos"]:
        """Prompt and answers, without what was written after the last row had ended."""
        return self.ids[:, : prompt + int(self.kept)]


class Loop:
    """What Hugging Face's ``generate`` runs in place of its own loop, for a model under a handle (``Localized``)."""

    def __init__(self, owner: Any):
        self.owner = owner

    def __call__(
        self,
        hf_model: Any,
        input_ids: Int[Tensor, "batch pos"],
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        **given: Any,
    ) -> Int[Tensor, "batch pos"]:
        """The sequences, prompt included."""
        others = [c for c in stopping_criteria if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))]
        if others:
            self.owner.stays_in_loop(f"{type(others[0]).__name__} is decided on the host, token by token")
            return hf_model._sample(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, **given
            )
        outputs = hf_model._prefill(input_ids, generation_config, given)
        given = hf_model._update_model_kwargs_for_generation(outputs, given)
        written = Written.behind(input_ids, generation_config, logits_processor, stopping_criteria)
        token = written.choose(outputs.logits[:, -1])
        del outputs
        # On a GPU, experts use other kernels when there is one token.
        quick = getattr(hf_model, "_optimize_model_for_decode", nullcontext)
        with quick():
            step = None if written.full else self._step(hf_model, written, given)
            while step is not None and not written.full:
                token = written.choose(step(token))
                if (written.length - input_ids.shape[1]) % LOOK == 0 and not bool(written.alive.any()):
                    break
        return written.sequences(input_ids.shape[1])

    def _step(self, hf_model: Any, written: Written, given: dict[str, Any]) -> Step:
        """The owner's step, set to the end of the prompt; it is rebuilt if this run has another shape."""
        split, mask = given["past_key_values"], given.get("attention_mask")
        near = self.owner.near.to(written.ids.device).of_batch(len(written.ids))
        shape = shape_of(near, split, written.ids.shape, mask)
        inputs = self._inputs(hf_model, written, given)
        if self.owner.step is None or not self.owner.step.fits(hf_model, inputs, shape):
            self.owner.step = None  # before another is allocated
            chunked = {i for i, kind in enumerate(self.owner.layer_types) if kind == "chunked_attention"}
            cache = FixedCache(split, near, shape, written.ids.device, chunked)
            self.owner.run_on(cache)
            self.owner.step = Step(hf_model, inputs, cache, self.owner.captures)
        step = self.owner.step
        self.owner.run_on(step.cache)
        step.load(inputs, split, near, mask)
        self.owner.decoding = "captured" if step.captured else "step"
        return step

    def _inputs(self, hf_model: Any, written: Written, given: dict[str, Any]) -> dict[str, Any]:
        """The model's inputs for the token after the prompt, as Hugging Face's loop prepares them."""
        ids = written.ids[:, : written.length]
        inputs = hf_model.prepare_inputs_for_generation(ids, next_sequence_length=1, **given)
        inputs = {name: value for name, value in inputs.items() if value is not None}
        for name in ("past_key_values", "use_cache", "return_dict"):
            inputs.pop(name, None)
        # The stores know what is seen; a mask of this form is passed on unchanged, and none is made.
        inputs["attention_mask"] = torch.ones(len(ids), 1, 1, 1, dtype=torch.bool, device=ids.device)
        return inputs


def shape_of(near: Near, split: SplitCache, sizes: torch.Size, mask: Tensor | None) -> Shape:
    """The shape of a step that follows this prompt.

    Args:
        near: the policy for the prompt's rows.
        split: the prompt's cache.
        sizes: rows, and positions including the new tokens.
        mask: which positions of the prompt are not padding; None for all.
    """
    rows, stop = sizes
    seen, pins = split.get_seq_length(), pins_of(split, near)
    count, grows = (0, 0) if pins is None else (pins.shape[1], stop - seen)
    if grows and not near.policy.keep_text:
        grows = max(0, min(grows, near.sinks_end - seen))
    if grows:
        count = -(-(count + grows + 1) // ROUND) * ROUND
    uneven = pins is not None and bool((pins < 0).any())
    padded = mask is not None and bool((mask.sum(1) < mask.shape[1] - near.first).any())
    return Shape(rows, -(-stop // ROUND) * ROUND, count, bool(grows), padded, uneven)


def why_not(model: Any, cache: SplitCache, given: dict[str, Any], config: Any) -> str:
    """Why a generation cannot use a step of fixed shapes; "" if it can.

    Args:
        model: the hooked model.
        cache: the empty cache that its prompt would be read into.
        given: the arguments of Hugging Face's ``generate``.
        config: the generation's settings.
    """
    if any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values()) or any(
        record.has_listeners() for record in model.text_attention()
    ):
        return "hooks listen"
    if config.get_generation_mode(given.get("assistant_model")) not in (
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
    ):
        return "several hypotheses at once"
    for name in ("streamer", "negative_prompt_ids", "stopping_criteria"):
        if given.get(name) is not None:
            return f"{name} waits for every token"
    if config.return_dict_in_generate or (config.guidance_scale or 1) != 1:
        return "outputs other than tokens, or guidance by a second prompt"
    if len({parameter.device for parameter in model.hf_model.parameters()}) > 1:
        return "layers on several devices"
    others = [i for i, layer in enumerate(cache.layers) if not isinstance(layer, SplitLayer)]
    if others:
        return f"layer {others[0]} caches something other than the keys of its own heads"
    return ""


def _addresses(hf_model: Any) -> int:
    return hash(tuple(parameter.data_ptr() for parameter in hf_model.parameters()))
