"""Text to tokens and back, under TransformerLens' names.

Plain text only: no chat template, no pictures, no system prompt. To ask the model something, use
``model.inputs(question, images=...)``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mech.errors import InputError


class Tokens:
    """TransformerLens' tokenizer methods."""

    tokenizer: Any
    device: Any

    def to_tokens(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: str = "right",
        move_to_device: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """The token ids of a text, or of several, padded to the longest.

        Args:
            input: one text or several.
            prepend_bos: put the beginning-of-sequence token before each; None follows the tokenizer's default.
            padding_side: "right" or "left".
            move_to_device: put the ids on the model's device.

        Raises:
            InputError: no texts, or a tokenizer that lacks the requested token.
        """
        texts = [input] if isinstance(input, str) else list(input) if isinstance(input, list | tuple) else []
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f"to_tokens of {type(input).__name__}: {input!r:.60}", "a string, or a list of strings")
        if padding_side not in ("right", "left"):
            raise InputError(f"padding_side={padding_side!r}", "'right' or 'left'")
        rows = [self._ids(text, prepend_bos) for text in texts]
        longest = max(map(len, rows))
        filler = self.tokenizer.pad_token_id
        if filler is None and any(len(row) < longest for row in rows):
            raise InputError("strings of different lengths", "a tokenizer with a pad token", "give them one by one")
        pads = [[filler] * (longest - len(row)) for row in rows]
        whole = [row + pad if padding_side == "right" else pad + row for row, pad in zip(rows, pads, strict=True)]
        return torch.tensor(whole, dtype=torch.long, device=self.device if move_to_device else None)

    def _ids(self, text: str, prepend_bos: bool | None) -> list[int]:
        if prepend_bos is None:
            return self.tokenizer.encode(text)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if not prepend_bos:
            return ids
        if self.tokenizer.bos_token_id is None:
            raise InputError(
                "prepend_bos=True with a tokenizer that has no BOS token", "a model that was trained with one",
                "leave prepend_bos out",
            )  # fmt: skip
        return [self.tokenizer.bos_token_id, *ids]

    def to_str_tokens(
        self, input: str | Sequence[str] | Tensor, prepend_bos: bool | None = None
    ) -> list[str] | list[list[str]]:
        """The text of each token: one list for a text or a row of ids, a list of lists for several texts or rows.

        Raises:
            InputError: neither texts nor token ids.
        """
        if isinstance(input, str):
            return self._texts(self._ids(input, prepend_bos))
        if isinstance(input, list | tuple) and input and all(isinstance(text, str) for text in input):
            return [self._texts(self._ids(text, prepend_bos)) for text in input]
        rows = _rows(input)
        return self._texts(rows.tolist()) if rows.ndim == 1 else [self._texts(row) for row in rows.tolist()]

    def _texts(self, ids: Sequence[int]) -> list[str]:
        return [self.tokenizer.decode([token]) for token in ids]

    def to_string(self, tokens: int | Sequence[int] | Tensor) -> str | list[str]:
        """The text of a token or of a row of tokens, special ones included; a list of texts for several rows.

        Raises:
            InputError: not token ids.
        """
        rows = _rows(tokens)
        return self.tokenizer.decode(rows.tolist()) if rows.ndim < 2 else self.tokenizer.batch_decode(rows.tolist())

    def to_single_token(self, text: str) -> int:
        """The id of a string that is one token.

        Raises:
            InputError: it is several tokens; the message lists their texts.
        """
        if not isinstance(text, str):
            raise InputError(f"to_single_token({text!r:.60})", "a string of one token", "give a string")
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            pieces = self._texts(ids)
            raise InputError(f"{text!r} is {len(ids)} tokens: {pieces}", "a string of one token", "give a token id")
        return ids[0]

    def to_single_str_token(self, token: int) -> str:
        """The text of a token.

        Raises:
            InputError: not one token id.
        """
        if _rows(token).numel() != 1:
            raise InputError(f"to_single_str_token({token!r:.60})", "one token id", "see to_str_tokens")
        return self._texts([int(_rows(token))])[0]


def _rows(tokens: Any) -> Int[Tensor, "*batch pos"]:
    try:
        ids = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0)
    if ids.numel() == 0 or ids.ndim > 2 or ids.is_floating_point() or ids.dtype == torch.bool or ids.min() < 0:
        raise InputError(f"token ids {tokens!r:.60}", "a token id, a row of them, or several rows", "see to_tokens")
    return ids.squeeze(0) if ids.ndim == 2 and len(ids) == 1 else ids
