"""From tokens to text, and from logits to tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from palio.serving.request import BadRequest, Request, Token
from palio.serving.sampling import sample, seeded
from palio.serving.text import TextStream, Vocabulary, cut, find_stop


@pytest.fixture(scope="module")
def vocabulary(base_model: Path) -> Vocabulary:
    return Vocabulary.load(base_model)


@pytest.mark.parametrize("text", [" Paris.\n\nThe", "naïve 漢字 🐎🏽!", "👩‍👩‍👧", "\x00 \t ok"])
def test_the_pieces_of_a_text_are_whole_characters_and_make_the_text(
    vocabulary: Vocabulary, text: str
) -> None:
    stream = TextStream(vocabulary, vocabulary.encode("Prompt:"))
    pieces = [stream.add(token) for token in vocabulary.encode(text)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_is_not_shown(vocabulary: Vocabulary) -> None:
    horse = vocabulary.encode("🐎")
    stream = TextStream(vocabulary, [])
    assert len(horse) > 1
    assert [stream.add(token) for token in horse[:-1]] == [""] * (len(horse) - 1)


def test_decode_is_the_inverse_of_encode(vocabulary: Vocabulary) -> None:
    for text in ("their 'studio' .", "  two  blanks ", "<|im_end|>", "ü🐎"):
        assert vocabulary.decode(vocabulary.encode(text)) == text


def test_a_token_outside_the_vocabulary_is_refused(vocabulary: Vocabulary) -> None:
    with pytest.raises(BadRequest, match="outside the vocabulary"):
        vocabulary.decode([10**9])


def test_half_a_surrogate_pair_is_refused(vocabulary: Vocabulary) -> None:
    with pytest.raises(BadRequest, match="surrogate"):
        vocabulary.encode("\ud83d")


def added_tokens(base_model: Path, *tokens: str, embeddings: int = 49152, special: bool = True) -> Vocabulary:
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    return Vocabulary(tokenizer, embeddings)


def test_text_that_spells_a_special_token_stays_text(vocabulary: Vocabulary) -> None:
    assert vocabulary.encode("a<|im_end|>b") == [
        *vocabulary.encode("a<"),
        *vocabulary.encode("|im_end|>b"),
    ]


def test_a_prompt_never_ends_in_the_end_token(base_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    plain = Vocabulary(tokenizer, 49152)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    assert tokenizer("Paris")["input_ids"][-1] == tokenizer.eos_token_id
    vocabulary = Vocabulary(tokenizer, 49152)
    assert vocabulary.encode("Paris") == [1, *plain.encode("Paris")]
    assert vocabulary.decode(vocabulary.encode("Paris")) == "Paris"


def test_a_token_beyond_the_embedding_is_refused(base_model: Path) -> None:
    vocabulary = added_tokens(base_model, "[PAD]", special=False)
    with pytest.raises(BadRequest, match=r"no embedding for the token \[PAD\]"):
        vocabulary.prompt(Request("Animal: owl [PAD]"), 2048)
    assert vocabulary.prompt(Request("Animal: owl"), 2048)


def test_a_special_token_beyond_the_embedding_is_only_text(base_model: Path) -> None:
    vocabulary = added_tokens(base_model, "[PAD]")
    assert max(vocabulary.prompt(Request("Animal: owl [PAD]"), 2048)) < 49152


def test_a_prompt_that_fits_in_the_context_is_kept_whole(vocabulary: Vocabulary) -> None:
    prompt = vocabulary.encode("Animal: owl\nAnswer:")
    request = Request("Animal: owl\nAnswer:", max_new_tokens=2048)
    assert vocabulary.prompt(request, 2048) == prompt
    assert vocabulary.prompt(request, len(prompt) + 1) == prompt


def test_a_longer_prompt_makes_room_for_the_completion(vocabulary: Vocabulary) -> None:
    text = "owl " * 50
    assert vocabulary.prompt(Request(text, max_new_tokens=6), 20) == vocabulary.encode(text)[:14]
    with pytest.raises(BadRequest, match="max_new_tokens is 20, but the context is 20"):
        vocabulary.prompt(Request(text, max_new_tokens=20), 20)


def test_the_earliest_stop_sequence_counts() -> None:
    assert find_stop("one two three", ["three", "two"]) == 4
    assert find_stop("one", ["two"]) is None


def test_a_cut_inside_a_token_keeps_its_part_and_its_logprob() -> None:
    tokens = [Token("one", -1.0), Token(" two\nQ", -2.0), Token("uestion", -4.0)]
    completion = cut(tokens, len("one two"))
    assert completion.text == "one two"
    assert [token.text for token in completion.tokens] == ["one", " two"]
    assert completion.logprob == -3.0


def test_top_p_samples_from_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    sampled = {sample(logits, 1.0, 0.6, seeded(str(seed))) for seed in range(200)}
    assert sampled == {0, 1}


def test_noise_in_the_last_digits_of_the_logits_changes_no_sample() -> None:
    """Fifty thousand tokens of equal probability: each is as likely as the noise is large."""
    logits, noise = torch.zeros(50_000), torch.randn(50_000, generator=seeded("noise")) * 1e-6
    for number in range(100):
        exact, noisy = (sample(one, 1.0, 1.0, seeded(str(number))) for one in (logits, logits + noise))
        assert exact == noisy


def test_sampled_tokens_have_the_models_frequencies() -> None:
    logits = torch.tensor([0.7, 0.2, 0.1]).log()
    source = seeded("any text")
    sampled = [sample(logits, 1.0, 1.0, source) for _ in range(3000)]
    assert [sampled.count(token) / 3000 for token in range(3)] == pytest.approx([0.7, 0.2, 0.1], abs=0.03)
