"""Tokens of a prompt, counted on our side: HELM shortens prompts to the window with the tokenizer of the
declared base model, and never asks an entry's server for it.

A token is the piece of the text that it stands for, so a prompt that is cut is a prefix of itself, whatever a
tokenizer's own decoding would make of it.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from palio.layout import Resources
from palio.provenance import code_sha256, file_sha256, fingerprint, library_versions, write_text

ESTIMATE = r" ?[A-Za-z]{1,5}|[\s\S]"
"""A token of an unknown tokenizer. Real ones make fewer of English, so no prompt is too long."""


class Window:
    """A tokenizer that cuts; `estimated` says why, if it is not the base model's own."""

    def __init__(self, tokenizer: Tokenizer, estimated: str = "") -> None:
        self._tokenizer, self.estimated = tokenizer, estimated
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # text that spells a control token stays text
        around = tokenizer.encode("a", add_special_tokens=True)
        self._prefix = around.special_tokens_mask.index(0)

    @classmethod
    def of_model(cls, folder: Path) -> Window:
        """Return the tokenizer of a model folder; an estimate if it cannot be loaded here, as one that is
        code of its own."""
        from palio.tokens import Tokens, load_tokenizer  # transformers, which takes seconds to import

        try:
            return cls(Tokenizer.from_str(Tokens(load_tokenizer(folder)).definition))
        except Exception as error:  # a tokenizer's files may be anything
            return cls.estimate(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.100}")

    @classmethod
    def kept(cls, folder: Path, resources: Resources) -> Window:
        """Return `of_model`, kept among the resources for all stages and entries of the same tokenizer:
        importing transformers is most of what a stage costs beside its server and HELM."""
        files = [path for path in folder.iterdir() if path.is_file() and path.suffix != ".safetensors"]
        content = {path.name: file_sha256(path) for path in files}
        made_by = {"palio": code_sha256(), **library_versions("transformers", "tokenizers")}
        path = resources.window(fingerprint([content, made_by]))
        if path.exists():
            return cls.read(path)
        window = cls.of_model(folder)
        if not window.estimated:
            with suppress(OSError):  # a folder that cannot be written only costs time
                window.write(path)
        return window

    @classmethod
    def estimate(cls, why: str) -> Window:
        """Return a tokenizer for want of the real one, whose tokens are short."""
        tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))  # noqa: S106 (not a password)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(ESTIMATE), behavior="isolated")
        return cls(tokenizer, why)

    @classmethod
    def read(cls, path: Path) -> Window:
        return cls(Tokenizer.from_file(str(path)))

    def write(self, path: Path) -> None:
        write_text(path, self._tokenizer.to_str())

    def pieces(self, text: str) -> list[str]:
        """Return the text in pieces, one a token; special tokens before it have none, and a character of
        several tokens belongs to the first."""
        pieces, done = [""] * self._prefix, 0
        for _, end in self._tokenizer.encode(text, add_special_tokens=False).offsets:
            pieces.append(text[done:end])
            done = max(done, end)
        if done < len(text):
            pieces[-1:] = ["".join([*pieces[-1:], text[done:]])]
        return pieces

    def count(self, text: str) -> int:
        return len(self.pieces(text))

    def cut(self, text: str, tokens: int) -> str:
        """Return as much of the beginning as so many tokens hold."""
        return "".join(self.pieces(text)[:tokens])
