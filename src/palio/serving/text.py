"""Tokens to text and back: whole characters only, and cut exactly at a stop sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

from palio.errors import BadInput
from palio.serving.request import BadRequest, Completion, Request, Token
from palio.tokens import Tokens, load_tokenizer

REPLACEMENT = "\ufffd"
"""What a decoder emits for bytes that are not a whole character yet."""
WINDOW = 8
"""Prompt tokens that can affect how the first new ones are written, e.g. a leading space."""


class Vocabulary:
    """A package's tokenizer as the server needs it.

    Args:
        embeddings: the number of tokens that the model has an embedding for.
        ends: tokens that end a completion besides the tokenizer's own, which training appends to answers.
    """

    def __init__(self, tokenizer: Any, embeddings: int, ends: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = Tokens(tokenizer)
        self._embeddings = embeddings
        end = tokenizer.eos_token_id
        self.ends = frozenset([*ends, *([] if end is None else [end])])
        self._size = len(tokenizer)

    @classmethod
    def load(cls, package: Path) -> Vocabulary:
        """Raises BadInput if the folder is not a package."""
        if not (package / "config.json").exists():
            raise BadInput(package, why="no config.json", fix="give a folder made by `palio package`")
        config = AutoConfig.from_pretrained(package, trust_remote_code=False).get_text_config()
        configs = [config]
        if (package / "generation_config.json").exists():
            configs.append(GenerationConfig.from_pretrained(package))
        ends = [end for each in configs if (end := each.eos_token_id) is not None]
        return cls(
            load_tokenizer(package),
            config.vocab_size,
            [token for end in ends for token in (end if isinstance(end, list) else [end])],
        )

    def encode(self, text: str) -> list[int]:
        """Encode a text as the start of a sequence."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadRequest("the text has half a surrogate pair; send whole characters") from None
        return self._tokens.encode(text)

    def prompt(self, request: Request, context: int) -> list[int]:
        """Encode a request's prompt for a context of so many tokens; an empty one becomes the start token.

        A prompt that fits in the context is kept whole, even if that shortens the completion. A longer one is
        cut from its right end, as HELM does, to make room for the whole completion.

        Raises:
            BadRequest: the prompt is empty and there is no start token, or too long for the completion, or it
                has a token that the model has no embedding for.
        """
        ids = self.encode(request.prompt) or self._tokens.prompt("")
        if not ids:
            raise BadRequest("the prompt is empty and this model has no start token; send text")
        if (largest := max(ids)) >= self._embeddings:
            token = self._tokenizer.convert_ids_to_tokens(largest)
            raise BadRequest(f"the model has no embedding for the token {token}; leave it out")
        if len(ids) + min(1, request.max_new_tokens) <= context:
            return ids
        if request.max_new_tokens >= context:
            raise BadRequest(
                f"the prompt has {len(ids)} tokens and max_new_tokens is {request.max_new_tokens}, "
                f"but the context is {context}; shorten either"
            )
        return ids[: context - request.max_new_tokens]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text that `encode` was given, without the special tokens that it prepends."""
        if any(not 0 <= token < self._size for token in tokens):
            raise BadRequest(f"a token is outside the vocabulary of {self._size}")
        count = len(self._tokens.prefix)
        if list(tokens[:count]) == self._tokens.prefix:
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
