"""What is trained is what is served: the same tokens of a prompt, and a completion that continues it."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from palio.demo.data import write_demo_sources
from palio.errors import BadInput
from palio.serving.request import BadRequest, Request
from palio.serving.text import Vocabulary
from palio.tokens import Tokens, complete_tokenizer, load_tokenizer

TEXTS = (
    "Question: What is 17 + 25?\nAnswer:",
    " 42",
    "The owl won the race in Siena, in July.",
    "def square(x):\n    return x * x\n",
    "naïve 漢字 🐎",
)
HELM_DATA = Path(os.environ.get("PALIO_SHARED", Path(__file__).parents[3] / "shared")) / "helm_data"
MISTRAL = Path(__file__).parents[1] / "data/mistral-7b-v0.1.tokenizer.model"
"""Apache-2.0; also in mistral-common, which is not installed: it would change which tokenizers load."""
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CONVERSATIONS = (
    ("Question: What is 17 + 25?\nAnswer:", " 42"),
    ("The owl", " won the race.\n"),
    ("Translate: naïve", "\n漢字 🐎"),
    ("Who won?", "The owl.", " When?\n", "In July.", "Where?", " In Siena."),
)


def trained_on_texts(model: models.Model, trainer: Any, **parts: Any) -> Tokenizer:
    backend = Tokenizer(model)
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.train_from_iterator([*TEXTS, *(turn for turns in CONVERSATIONS for turn in turns)] * 3, trainer)
    return backend


def byte_level(bos: str | None, eos: str) -> PreTrainedTokenizerFast:
    """GPT-2's kind; with `bos`, Llama 3's."""
    special = sorted({eos, *([bos] if bos else [])})
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend = trained_on_texts(
        models.BPE(),
        trainer,
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
    )
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos or eos, eos_token=eos)


def metaspace(*, post: str, prepend: bool = False) -> PreTrainedTokenizerFast:
    """SentencePiece's kind: T5's with a Metaspace, Llama 2's with the normalizer Prepend."""
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"])
    parts: dict[str, Any] = {"pre_tokenizer": pre_tokenizers.Metaspace(), "decoder": decoders.Metaspace()}
    if prepend:
        parts = {
            "normalizer": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
            "decoder": decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            ),
        }
    backend = trained_on_texts(models.BPE(unk_token=NAMES["unk_token"]), trainer, **parts)
    special = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=post, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES)


def mistral(folder: Path) -> PreTrainedTokenizerFast:
    """Load Mistral 7B's own tokenizer from a model folder that has only its tokenizer.model."""
    shutil.copyfile(MISTRAL, folder / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **NAMES}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    complete_tokenizer(folder)
    loaded: PreTrainedTokenizerFast = load_tokenizer(folder)
    return loaded


KINDS: dict[str, Callable[[Path], Any]] = {
    "mistral": mistral,
    "llama 3": lambda folder: byte_level("<|begin_of_text|>", "<|end_of_text|>"),
    "gpt-2": lambda folder: byte_level(None, "<|endoftext|>"),
    "llama 2": lambda folder: metaspace(post="<s> $A", prepend=True),
    "t5": lambda folder: metaspace(post="$A </s>"),
    "adds an end token": lambda folder: metaspace(post="<s> $A </s>"),
}


@pytest.fixture(params=KINDS, ids=str)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return KINDS[request.param](tmp_path)


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def served(tokenizer: Any, prompt: str) -> list[int]:
    return Vocabulary(tokenizer, len(tokenizer)).prompt(Request(prompt), 1 << 20)


def test_a_trained_prompt_has_the_tokens_of_a_served_one(tokenizer: Any) -> None:
    for (ids, answers), turns in zip(Tokens(tokenizer).rows(CONVERSATIONS), CONVERSATIONS, strict=True):
        assert ids[: answers[0][0]] == served(tokenizer, turns[0])


def test_a_prompt_never_ends_with_the_end_token_and_has_every_other_one(tokenizer: Any) -> None:
    for turns in CONVERSATIONS:
        plain = tokenizer(turns[0])["input_ids"]
        prompt = served(tokenizer, turns[0])
        assert prompt[-1] != tokenizer.eos_token_id
        assert plain in (prompt, [*prompt, tokenizer.eos_token_id])


def test_a_row_decodes_to_prompt_and_completion_and_ends_with_the_end_token(tokenizer: Any) -> None:
    for (ids, answers), turns in zip(Tokens(tokenizer).rows(CONVERSATIONS), CONVERSATIONS, strict=True):
        assert text_of(tokenizer, ids) == "".join(turns)
        for (start, end), completion in zip(answers, turns[1::2], strict=True):
            assert text_of(tokenizer, ids[:end]) == text_of(tokenizer, ids[:start]) + completion
            assert ids[end - 1] == tokenizer.eos_token_id


def test_later_turns_have_the_tokens_of_the_joined_text(tokenizer: Any) -> None:
    """As the server would see them, but for the end tokens between."""
    turns = ("Who won?\n", "The owl.\n", "When?\n", "In July.\n")
    ((ids, _),) = Tokens(tokenizer).rows([turns])
    joined = served(tokenizer, "".join(turns))
    assert [token for token in ids if token != tokenizer.eos_token_id] == joined


@pytest.mark.skipif(not HELM_DATA.is_dir(), reason="no GSM8K and MMLU under PALIO_SHARED/helm_data")
def test_a_thousand_real_prompts_are_trained_and_served_as_mistral_tokenizes_them(tmp_path: Path) -> None:
    """Judged by SentencePiece itself with Mistral's own model, and so are whole rows."""
    pairs = [*islice(gsm8k(), 500), *islice(mmlu(), 500)]
    assert len({prompt for prompt, _ in pairs}) == 1000
    dialogues = [tuple(chain.from_iterable(pairs[n : n + 2])) for n in (0, 498, 998)]
    tokenizer, truth = mistral(tmp_path), SentencePieceProcessor(model_file=str(MISTRAL))
    vocabulary = Vocabulary(tokenizer, len(tokenizer))
    conversations = [*pairs, *dialogues]
    for (ids, answers), turns in zip(Tokens(tokenizer).rows(conversations), conversations, strict=True):
        assert [ids[end - 1] for _, end in answers] == [truth.eos_id()] * (len(turns) // 2)
        assert truth.decode(ids) == "".join(turns)
        for number, (start, _) in enumerate(answers):
            before = [token for token in ids[:start] if token != truth.eos_id()]
            text = "".join(turns[: 2 * number + 1])
            assert before == vocabulary.prompt(Request(text), 1 << 20)
            assert before == [truth.bos_id(), *truth.encode(text)]


def gsm8k() -> Iterator[tuple[str, str]]:
    for line in (HELM_DATA / "gsm/gsm_data_test").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield f"Q: {row['question']}\nA:", f" {row['answer']}\n"


def mmlu() -> Iterator[tuple[str, str]]:
    for path in sorted((HELM_DATA / "mmlu/data/test").glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as stream:
            for question, *options, answer in csv.reader(stream):
                letters = zip("ABCD", options, strict=True)
                listed = "".join(f"{letter}. {option}\n" for letter, option in letters)
                yield f"Question: {question}\n{listed}Answer:", f" {answer}"


def test_text_that_spells_a_control_token_stays_text(tokenizer: Any) -> None:
    end = tokenizer.eos_token
    ((ids, _),) = Tokens(tokenizer).rows([(f"a {end} b", f" old{end} c")])
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.eos_token_id not in served(tokenizer, f"a {end} b")
    if tokenizer.unk_token_id not in ids:  # a toy vocabulary may lack a character
        assert text_of(tokenizer, ids) == f"a {end} b old{end} c"


def test_an_empty_prompt_starts_from_the_start_token(tokenizer: Any) -> None:
    ((ids, ((start, _),)),) = Tokens(tokenizer).rows([("", "x")])
    assert ids[:start] == served(tokenizer, "")
    assert ids[:start] == [tokenizer.bos_token_id]


def test_an_empty_prompt_without_a_start_token_is_refused() -> None:
    tokenizer = byte_level(None, "<|endoftext|>")
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(BadRequest, match="no start token"):
        served(tokenizer, "")


def test_the_demos_rows_have_the_tokens_that_they_always_had(base_model: Path, tmp_path: Path) -> None:
    """Turn by turn without special tokens: the tokenizer adds none, and no space."""
    write_demo_sources(tmp_path, seed=7)
    lines = (line for path in sorted(tmp_path.glob("*.jsonl")) for line in path.read_text().splitlines())
    rows = [json.loads(line) for line in lines]
    pairs = [(row["prompt"], row["completion"]) for row in rows if {"prompt", "completion"} <= row.keys()]
    assert len(pairs) > 1000
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    plain = tokenizer([text for pair in pairs for text in pair], add_special_tokens=False)["input_ids"]
    before = [[*plain[2 * n], *plain[2 * n + 1], tokenizer.eos_token_id] for n in range(len(pairs))]
    assert [ids for ids, _ in Tokens(load_tokenizer(base_model)).rows(pairs)] == before
    vocabulary = Vocabulary(tokenizer, len(tokenizer))
    assert [vocabulary.prompt(Request(prompt), 1 << 20) for prompt, _ in pairs] == plain[::2]


# --- chat templates ----------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def chat(base_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(base_model)


def test_a_turn_that_spells_a_control_token_stays_text_in_a_chat(chat: Any) -> None:
    chat.chat_template = TEMPLATE
    ((ids, ((start, end),)),) = Tokens(chat).chat_rows([("say <|im_end|>!", "yes<|im_end|>no")])
    assert ids.count(chat.convert_tokens_to_ids("<|im_end|>")) == 2
    assert chat.decode(ids[start:end]) == "yes<|im_end|>no<|im_end|>\n"
    plain = Tokens(chat).chat_rows([("say it", "yes")])
    templated = chat.apply_chat_template(
        [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "yes"}], return_dict=False
    )
    assert next(plain)[0] == templated


def test_the_end_token_of_a_chat_is_the_templates(chat: Any) -> None:
    chat.chat_template = TEMPLATE
    chat.eos_token = "<|endoftext|>"
    assert Tokens(chat).ends(chat=True) == {chat.convert_tokens_to_ids("<|im_end|>")}
    assert Tokens(chat).ends(chat=False) == {chat.convert_tokens_to_ids("<|endoftext|>")}


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "writes no end token"),
        ("{{ raise_exception('roles must alternate') }}", r"fails \(TemplateError: roles must alternate\)"),
        ("{% for m in messages %}{{ m.content }}", r"fails \(TemplateSyntaxError: "),
        (None, "is missing"),
    ],
)
def test_a_chat_template_that_cannot_be_trained_on_is_refused(chat: Any, template: str, problem: str) -> None:
    chat.chat_template = template
    with pytest.raises(
        BadInput, match=rf"the chat template {problem}.*row 0.*remove finetune\.chat_template"
    ):
        list(Tokens(chat).chat_rows([("a", "b")]))


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    tokenizer = byte_level(None, "<|endoftext|>")
    tokenizer.eos_token = None
    with pytest.raises(BadInput, match="add eos_token to"):
        list(Tokens(tokenizer).rows(CONVERSATIONS))
