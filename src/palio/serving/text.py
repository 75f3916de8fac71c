"""Tokens to text and back: whole characters only, and cut exactly at a stop sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from palio.serving.engine import BadRequest, Completion, Token

BROKEN = "\ufffd"
"""What a decoder shows for bytes that are not yet a whole character."""
CONTEXT = 8
"""Prompt tokens that decide how the first new ones are written, e.g. a leading space."""


class Vocabulary:
    """A Hugging Face tokenizer as the server needs it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._prefix: list[int] = tokenizer("")["input_ids"]
        self._size = len(tokenizer)

    def encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRequest("the text has half a surrogate pair; send whole characters") from None
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def prompt(self, text: str) -> list[int]:
        """As `encode`, but never empty: a model starts from its first special token.

        Raises:
            BadRequest: an empty prompt, and the tokenizer has no token to start from.
        """
        if ids := self.encode(text):
            return ids
        for start in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if start is not None:
                return [start]
        raise BadRequest("the prompt is empty and this model has no start token; send text")

    def decode(self, tokens: Sequence[int]) -> str:
        """The text `encode` got: without the special tokens that it puts before a text."""
        if any(not 0 <= token < self._size for token in tokens):
            raise BadRequest(f"a token is outside the vocabulary of {self._size}")
        count = len(self._prefix)
        if count and list(tokens[:count]) == self._prefix:
            tokens = tokens[count:]
        text: str = self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return text

    def visible(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens; special ones have none."""
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class TextStream:
    """The text of a growing token sequence, one piece per token.

    A character whose bytes are spread over tokens belongs to the last of them; the others' pieces are
    empty. The pieces joined are the text.
    """

    def __init__(self, vocabulary: Vocabulary, context: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._window = list(context[-CONTEXT:])
        self._shown = len(vocabulary.visible(self._window))

    def add(self, token: int) -> str:
        self._window.append(token)
        text = self._vocabulary.visible(self._window)
        if text.endswith(BROKEN):
            return ""
        piece = text[self._shown :]
        if piece:
            self._window = self._window[-CONTEXT:]
            text = self._vocabulary.visible(self._window)
        self._shown = len(text)
        return piece


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the earliest stop sequence begins in `text`."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return min(found, default=None)


def cut(tokens: Sequence[Token], length: int) -> Completion:
    """The first `length` characters; a token across the border keeps its part and its log-probability."""
    kept: list[Token] = []
    left = length
    for token in tokens:
        if left <= 0:
            break
        kept.append(token if len(token.text) <= left else replace(token, text=token.text[:left]))
        left -= len(token.text)
    return Completion("".join(token.text for token in kept), tuple(kept))
