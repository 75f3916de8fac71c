"""Tokens of prompts and completions. Training and serving both get them here, so what is trained is served.

A prompt starts with the tokenizer's special tokens (BOS) and never ends with one. A completion, or a later
turn, is tokenized as its continuation: no space is put before it, and the tokens decode to
prompt + completion. Text that spells a control token stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import transformers
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from palio.errors import BadInput

TokenRow = tuple[list[int], tuple[tuple[int, int], ...]]
"""Tokens of a conversation, and start and end of each of its answers; an answer includes its end token."""

MASK = "\ue000"
"""A private-use character, which no template or control token contains."""


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model folder, the same one whether or not mistral-common is installed."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, mistral_format=False)


def extended_tokenizer(folder: Path, extra: Sequence[str]) -> Any:
    """Load the tokenizer of a model folder and add tokens to it, whose texts then become one token each.

    They are no control tokens: text that spells one would stay text. Raises BadInput for one that it has.
    """
    tokenizer = load_tokenizer(folder)
    for text in extra:
        if text in tokenizer.get_vocab():
            why, fix = "the base model's tokenizer has it", "leave it out"
            raise BadInput("finetune", "extra_tokens", text, why=why, fix=fix)
        tokenizer.add_tokens(AddedToken(text, normalized=False, special=False))
    return tokenizer


MARK = "\u2581"
"""What SentencePiece writes for a space."""

SENTENCES = (
    "Q: 17 + 25?\nA:",
    "def f(x):\n    return x\n\n\tpass",
    "  two spaces  before and after  ",
    "Naïve café, 東京, 🐎 and \u2028",
)
"""Texts of different kinds by which two tokenizers are held to be the same."""


def complete_tokenizer(folder: Path) -> None:
    """Add tokenizer.json to a model folder that has only SentencePiece's tokenizer.model.

    transformers 5.23 would read that file otherwise than SentencePiece does: it merges in the order of the
    tokens' numbers instead of their scores, and gives some families no space before a text.

    Raises BadInput if the result does not tokenize as SentencePiece does.
    """
    model, made = folder / "tokenizer.model", folder / "tokenizer.json"
    if not model.is_file() or made.is_file():
        return
    try:
        truth = SentencePieceProcessor(model_file=str(model))
    except (RuntimeError, OSError):  # tiktoken's format has the same name
        return
    expected = truth.encode(list(SENTENCES))
    for loader in (*_named_class(folder / "tokenizer_config.json"), AutoTokenizer, LlamaTokenizer):
        with suppress(Exception):  # the files are untrusted: loading them may raise anything
            backend = loader.from_pretrained(folder, trust_remote_code=False).backend_tokenizer
            Tokenizer.from_str(_as_sentencepiece(backend.to_str(), truth)).save(str(made))
            found = load_tokenizer(folder)(list(SENTENCES), add_special_tokens=False)["input_ids"]
            if found == expected:
                return
        made.unlink(missing_ok=True)
    why = "transformers does not tokenize as SentencePiece does with this file"
    fix = "add the tokenizer.json of the model, or use another base model"
    raise BadInput("tokenizer", "tokenizer.model", why=why, fix=fix)


def _named_class(config: Path) -> list[Any]:
    """Return the class that a tokenizer_config.json names, if transformers has it."""
    content = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    named = getattr(transformers, str(content.get("tokenizer_class")).removesuffix("Fast"), None)
    return [named] if isinstance(named, type) and issubclass(named, PreTrainedTokenizerBase) else []


def _as_sentencepiece(definition: str, truth: SentencePieceProcessor) -> str:
    """Return a definition (tokenizer.json) with SentencePiece's order of merges and its spaces."""
    content = json.loads(definition)
    if merges := content["model"].get("merges"):
        merges.sort(key=lambda pair: -truth.get_score(truth.piece_to_id("".join(pair))))
    before = content["pre_tokenizer"] or {}
    if before.get("type") == "Metaspace" and before["prepend_scheme"] != "never" and not before["split"]:
        # Metaspace leaves out the space before a text that begins with one.
        prepend = {"type": "Prepend", "prepend": MARK}
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
        content["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
        content["pre_tokenizer"] = None
    return json.dumps(content, ensure_ascii=False)


class Tokens:
    """Encodes prompts and conversations with a Hugging Face tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises BadInput for a tokenizer without a definition (tokenizer.json) to work from."""
        if not tokenizer.is_fast:
            why, fix = "has no tokenizer.json form", "convert it to one, or use another base model"
            raise BadInput("tokenizer", "class", type(tokenizer).__name__, why=why, fix=fix)
        self._tokenizer = tokenizer
        definition = json.loads(tokenizer.backend_tokenizer.to_str())
        self._first, self._next = _backend(definition), _backend(_without_prefix_space(definition))
        around = self._first.encode("a", add_special_tokens=True)
        self.prefix = around.ids[: around.special_tokens_mask.index(0)]
        """Special tokens before a text."""
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = special | set(tokenizer.all_special_ids)
        spelled = sorted(
            filter(None, map(tokenizer.convert_ids_to_tokens, self._special)), key=len, reverse=True
        )
        self._control = re.compile("|".join(map(re.escape, spelled)) or r"(?!)")

    @property
    def definition(self) -> str:
        """The definition (tokenizer.json) of what encodes a text from its beginning."""
        return self._first.to_str()

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text as a model sees it: special tokens before it, none after it."""
        return [*self.prefix, *self._first.encode(text, add_special_tokens=False).ids]

    def prompt(self, text: str) -> list[int]:
        """Return `encode(text)`, or the start token for an empty prompt; empty if the model has none."""
        starts = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        return self.encode(text) or [start for start in starts if start is not None][:1]

    def ends(self, *, chat: bool) -> set[int]:
        """Return the tokens that training teaches to end an answer with.

        Raises BadInput if there are none: such a model would never stop.
        """
        if chat:
            ((ids, ((start, end),)),) = self.chat_rows([("a", "b")])
            return {self._end_of(ids[start:end])}
        if self._tokenizer.eos_token_id is None:
            why, fix = "the tokenizer has no end-of-sequence token", "add eos_token to tokenizer_config.json"
            raise BadInput("tokenizer", "eos_token", why=why, fix=fix)
        return {self._tokenizer.eos_token_id}

    def rows(self, conversations: Sequence[Sequence[str]]) -> Iterator[TokenRow]:
        """Yield the tokens of conversations (prompt, completion, prompt, …); completions end with EOS."""
        end = self.ends(chat=False)
        later = [turn for turns in conversations for turn in turns[1:]]
        encoded = iter(self._next.encode_batch_fast(later, add_special_tokens=False))
        for turns in conversations:
            ids = self.prompt(turns[0])
            answers = []
            for number in range(1, len(turns)):
                start = len(ids)
                ids += next(encoded).ids
                if number % 2:
                    ids += end
                    answers.append((start, len(ids)))
            yield ids, tuple(answers)

    def chat_rows(self, conversations: Sequence[Sequence[str]]) -> Iterator[TokenRow]:
        """Yield the tokens of conversations in the chat template, as a chat server makes them.

        An answer is what follows the template of all turns before it. Raises BadInput if the template is
        missing or fails, writes no end token, or changes a turn once it is answered.
        """
        for number, turns in enumerate(conversations):
            try:
                yield self._chat_row(turns)
            except _TemplateError as error:
                why = f"the chat template {error} (row {number} of the dataset)"
                fix = "fix the template of the base model or that row, or remove finetune.chat_template"
                raise BadInput("tokenizer", "chat_template", why=why, fix=fix) from None

    def _chat_row(self, turns: Sequence[str]) -> TokenRow:
        whole: list[int] = []
        answers = []
        for end in range(2, len(turns) + 1, 2):
            asked = self._templated(turns[: end - 1], add_generation_prompt=True)
            answered = self._templated(turns[:end])
            if asked[: len(whole)] != whole or answered[: len(asked)] != asked:
                raise _TemplateError("changes a turn once it is answered")
            self._end_of(answered[len(asked) :])
            answers.append((len(asked), len(answered)))
            whole = answered
        return whole, tuple(answers)

    def _end_of(self, answer: Sequence[int]) -> int:
        """Return the control token that ends an answer in a chat template."""
        for position in reversed(range(len(answer))):
            if answer[position] in self._special:
                return answer[position]
            if self._tokenizer.decode(answer[position:]).strip():
                break
        raise _TemplateError("writes no end token after an answer")

    def _templated(self, turns: Sequence[str], *, add_generation_prompt: bool = False) -> list[int]:
        text = self._render(turns, add_generation_prompt)
        if not any(map(self._control.search, turns)):
            ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids
        # The control tokens are those that the template writes, not those that a turn spells.
        masked = self._render(
            [self._control.sub(lambda match: MASK * len(match[0]), turn) for turn in turns],
            add_generation_prompt,
        )
        if len(masked) != len(text):
            raise _TemplateError("alters turns that spell a control token")
        ids, done = [], 0
        for match in self._control.finditer(masked):
            ids += self._first.encode(text[done : match.start()], add_special_tokens=False).ids
            ids.append(self._tokenizer.convert_tokens_to_ids(match[0]))
            done = match.end()
        return ids + self._first.encode(text[done:], add_special_tokens=False).ids

    def _render(self, turns: Sequence[str], add_generation_prompt: bool) -> str:
        if self._tokenizer.chat_template is None:
            raise _TemplateError("is missing")
        messages = [
            {"role": role, "content": turn}
            for role, turn in zip(cycle(("user", "assistant")), turns, strict=False)
        ]
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program: it may raise anything
            cause = str(error).strip().partition("\n")[0]
            raise _TemplateError(f"fails ({type(error).__name__}: {cause})") from None
        return text


class _TemplateError(Exception):
    """The chat template cannot be trained on; the message continues "the chat template …"."""


def _backend(definition: dict[str, Any]) -> Tokenizer:
    backend = Tokenizer.from_str(json.dumps(definition))
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # text that spells a control token stays text
    return backend


def _without_prefix_space(definition: Any) -> Any:
    """Return a tokenizer's definition without the parts that put a space before a text.

    These are Metaspace's prefix (SentencePiece), the normalizer Prepend (Llama) and ByteLevel's prefix space.
    """
    if isinstance(definition, list):
        parts = (_without_prefix_space(part) for part in definition)
        return [part for part in parts if part is not None]
    if not isinstance(definition, dict):
        return definition
    if definition.get("type") == "Prepend":
        return None
    changed = {key: _without_prefix_space(value) for key, value in definition.items() if key != "model"}
    if "model" in definition:
        changed["model"] = definition["model"]
    if "prepend_scheme" in changed:
        changed["prepend_scheme"] = "never"
    if "add_prefix_space" in changed:
        changed["add_prefix_space"] = False
    return changed
