"""Tokens to text and back: whole characters only, and cut exactly at a stop sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from palio.errors import BadInput
from palio.serving.request import BadRequest, Completion, Request, Token

REPLACEMENT = "\ufffd"
"""What a decoder emits for bytes that are not a whole character yet."""
WINDOW = 8
"""Prompt tokens that can affect how the first new ones are written, e.g. a leading space."""


class Vocabulary:
    """A package's tokenizer as the server needs it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._prefix: list[int] = tokenizer("")["input_ids"]
        self._size = len(tokenizer)

    @classmethod
    def load(cls, package: Path) -> Vocabulary:
        """Raises BadInput if the folder is not a package."""
        if not (package / "config.json").exists():
            raise BadInput(package, "", None, "no config.json; give a folder made by `palio package`")
        return cls(AutoTokenizer.from_pretrained(package))

    def encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRequest("the text has half a surrogate pair; send whole characters") from None
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def prompt(self, request: Request, context: int) -> list[int]:
        """Encode a request's prompt; an empty one becomes the model's start token.

        A prompt is cut from its right end, as HELM does, to make room for the completion in the context.

        Raises:
            BadRequest: an empty prompt, and the tokenizer has no start token.
        """
        if ids := self.encode(request.prompt):
            return ids[: max(1, context - request.max_new_tokens)]
        for start in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if start is not None:
                return [start]
        raise BadRequest("the prompt is empty and this model has no start token; send text")

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text that `encode` was given, without the special tokens it prepends."""
        if any(not 0 <= token < self._size for token in tokens):
            raise BadRequest(f"a token is outside the vocabulary of {self._size}")
        count = len(self._prefix)
        if count and list(tokens[:count]) == self._prefix:
            tokens = tokens[count:]
        text: str = self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return text

    def visible(self, tokens: Sequence[int]) -> str:
        """Return the text of generated tokens; special tokens have none."""
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class TextStream:
    """The text of a growing token sequence, one piece per token; the pieces joined are the text.

    A character whose bytes span several tokens belongs to the last of them; the others have no text.
    """

    def __init__(self, vocabulary: Vocabulary, context: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._window = list(context[-WINDOW:])
        self._shown = len(vocabulary.visible(self._window))

    def add(self, token: int) -> str:
        self._window.append(token)
        text = self._vocabulary.visible(self._window)
        if text.endswith(REPLACEMENT):
            return ""
        piece = text[self._shown :]
        if piece:
            self._window = self._window[-WINDOW:]
            text = self._vocabulary.visible(self._window)
        self._shown = len(text)
        return piece


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return where the earliest stop sequence begins in `text`."""
    starts = [start for stop in stops if (start := text.find(stop)) >= 0]
    return min(starts, default=None)


def cut(tokens: Sequence[Token], length: int) -> Completion:
    """Keep the first `length` characters; a token that is cut keeps its log-probability."""
    kept: list[Token] = []
    left = length
    for token in tokens:
        if left <= 0:
            break
        kept.append(token if len(token.text) <= left else replace(token, text=token.text[:left]))
        left -= len(token.text)
    return Completion("".join(token.text for token in kept), tuple(kept))
