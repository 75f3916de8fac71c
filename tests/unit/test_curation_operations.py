"""Operations one by one: what each drops, rewrites and keeps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palio.curation.operations.clean_markup import without_markup
from palio.curation.operations.sample_rows import shares
from palio.errors import BadInput
from tests.support.curation import curate, pairs_of, recipe, write_jsonl
from tests.support.training import tiny_base_model

Rows = list[tuple[str, str]]
Operation = dict[str, Any] | str
WORDS = [f"{first}{second}" for first in "bcdfglmnprstv" for second in ("ala", "eno", "isto", "ora", "umi")]


def kept(rows: Rows, operation: Operation, folder: Path, base_model: Path = Path("none")) -> Rows:
    """What an operation leaves of the rows, in their order."""
    source = write_jsonl(
        folder / "rows.jsonl",
        [
            {"id": n, "prompt": prompt, "completion": completion}
            for n, (prompt, completion) in enumerate(rows)
        ],
    )
    curate(recipe([{"path": str(source)}], operation), folder / "dataset", base_model)
    table = pq.read_table(folder / "dataset/train.parquet").to_pylist()
    return [(row["prompt"], row["completion"]) for row in sorted(table, key=lambda row: int(row["id"]))]


# --- markup ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("<p>Who <b>won</b>?</p>", "Who won?"),
        ("one<br/>\ntwo<br>three", "one\ntwo\nthree"),
        ("<div class='q'>A &amp; B &lt; C</div>", "A & B < C"),
        ("**Rules:** *all* of them", "Rules: all of them"),
        ("a  b\t c  \nd", "a b c\nd"),
        (" ] )", " ] )"),
        ("Target:\n", "Target:\n"),
        ("X * * Y = Z * 2 * 3", "X * * Y = Z * 2 * 3"),
        ("if a < b and c > d: x**2 + y**2", "if a < b and c > d: x**2 + y**2"),
        ("List<int> f(<n>)", "List<int> f(<n>)"),
    ],
)
def test_markup_goes_and_formulas_stay(text: str, clean: str) -> None:
    assert without_markup(text) == clean


def test_a_row_of_markup_alone_is_dropped(tmp_path: Path) -> None:
    assert kept([("Who?", "<p></p>"), ("Who?", "me")], "clean_markup", tmp_path) == [("Who?", "me")]


# --- refusals and lengths -------------------------------------------------------------------------


def test_answers_that_match_a_pattern_are_dropped_and_questions_may_match(tmp_path: Path) -> None:
    rows = [("Why?", "Sorry, as an AI I won't."), ("Talk as an AI", "beep"), ("Why?", "I cannot say.")]
    assert kept(rows, "drop_refusals", tmp_path) == [("Talk as an AI", "beep")]


def test_matches_of_a_pattern_are_replaced_in_the_named_field(tmp_path: Path) -> None:
    operation = {"op": "replace_matches", "pattern": r"\s*\[\d+\]", "field": "completion"}
    rows = [("Cite [1]?", "Yes [1] [23]."), ("Empty?", "[4]")]
    assert kept(rows, operation, tmp_path) == [("Cite [1]?", "Yes.")]


def test_rows_with_a_match_in_the_named_field_are_dropped(tmp_path: Path) -> None:
    rows = [("See http://a.b", "ok"), ("Where?", "HTTP://a.b"), ("Where?", "here")]
    operation = {"op": "drop_matches", "patterns": ["https?://"], "field": "completion"}
    assert kept(rows, operation, tmp_path / "one") == [rows[0], rows[2]]
    assert kept(rows, {**operation, "field": "both"}, tmp_path / "both") == [rows[2]]


# --- language and quality -------------------------------------------------------------------------

ENGLISH = "The race is run twice a year in the main square, and the whole town comes to watch the horses."


def test_rows_in_other_languages_are_dropped_and_what_has_no_language_stays(tmp_path: Path) -> None:
    italian = "La corsa si tiene due volte l'anno nella piazza principale e tutta la città viene a vederla."
    rows = [(ENGLISH, "Yes, it does."), (italian, "Sì, è vero, ogni anno."), ("X Y ( [ ]", "17 + 25")]
    assert kept(rows, "keep_languages", tmp_path / "en") == [rows[0], rows[2]]
    both = {"op": "keep_languages", "languages": ["en", "it"]}
    assert kept(rows, both, tmp_path / "both") == rows


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a b c d e f g h i j k l", "in a word on average"),
        ("#winning #horses are #running today", "# and … per word"),
        ("12345 678 90123 4567 word", "have a letter"),
        ("\n".join(f"- famous wine called {town}" for town in WORDS[:10]), "begin with a bullet"),
        ("buy more now\nbuy more now\nbuy more now\nbye then friend", "stand twice"),
        ("great deal great deal great deal great deal", "one pair of words"),
        ("Please read our terms of use before going on with this", "terms of use"),
    ],
)
def test_each_heuristic_of_quality_drops_what_it_is_about(text: str, fault: str, tmp_path: Path) -> None:
    rows = [(text, "ok then"), (ENGLISH, "It does indeed.")]
    assert kept(rows, "keep_quality", tmp_path) == rows[1:]
    reasons = pq.read_table(tmp_path / "dataset/dropped.parquet")["reason"].to_pylist()
    assert fault in reasons[0]


def test_a_pattern_that_is_no_regular_expression_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not a regular expression"):
        kept([("a", "b")], {"op": "drop_refusals", "patterns": ["("]}, tmp_path)


def test_rows_outside_the_lengths_are_dropped(tmp_path: Path) -> None:
    rows = [("a" * 10, "b"), ("a" * 11, "b"), ("a", "b" * 6)]
    operation = {"op": "length_filter", "max_prompt": 10, "max_completion": 5}
    assert kept(rows, operation, tmp_path) == rows[:1]


def test_tokens_are_counted_by_the_entrys_own_tokenizer_as_the_trainer_counts(
    tmp_path: Path, base_model: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_model)
    rows = [("word " * count, "yes") for count in range(1, 20)]
    lengths = [
        sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in row) + 1 for row in rows
    ]
    left = kept(rows, {"op": "token_length", "min": 5, "max": 12}, tmp_path, base_model)
    assert left == [row for row, length in zip(rows, lengths, strict=True) if 5 <= length <= 12]
    assert 0 < len(left) < len(rows)


# --- agreement and duplicates ---------------------------------------------------------------------


def test_the_most_frequent_answer_stays_and_a_tie_drops_the_prompt(tmp_path: Path) -> None:
    rows = [
        ("2 + 2 =", "4"), ("2 + 2 =", "5"), ("2  + 2 = ", "4 "),
        ("Best horse?", "Remorex"), ("best horse?", "Panezio"),
        ("Alone?", "yes"),
    ]  # fmt: skip
    assert kept(rows, "drop_disagreement", tmp_path) == [rows[0], rows[2], rows[5]]


def test_of_equal_rows_the_first_stays(tmp_path: Path) -> None:
    rows = [("Who won?", "Oca"), ("who  won? ", "OCA"), ("Who won?", "Onda")]
    assert kept(rows, "drop_exact_duplicates", tmp_path) == [rows[0], rows[2]]


def essays(count: int, seed: int = 0) -> Rows:
    draw = random.Random(seed)
    return [(" ".join(draw.choices(WORDS, k=80)), " ".join(draw.choices(WORDS, k=20))) for _ in range(count)]


def test_near_duplicates_are_found_and_the_first_stays(tmp_path: Path) -> None:
    originals = essays(300)
    draw = random.Random(1)
    copies = []
    for prompt, completion in originals:
        words = prompt.split()
        for place in draw.sample(range(len(words)), 2):
            words[place] = draw.choice(WORDS)
        copies.append((" ".join(words), completion))
    left = kept(originals + copies, "drop_near_duplicates", tmp_path)
    assert set(originals) <= set(left)
    assert len(set(copies) & set(left)) <= 0.02 * len(copies)


def test_questions_that_differ_in_one_number_or_name_are_no_duplicates(tmp_path: Path) -> None:
    frame = " ".join(essays(1)[0][0].split()[:60])
    numbers = [
        (f"{frame} and then sold {n} horses in July. How many are left?", "some") for n in range(2, 40)
    ]
    names = [
        (f"{frame} and then {name} sold the horse. Who owns it?", "nobody")
        for name in ("Anna", "Bruno", "Carla")
    ]
    copies = [(prompt.replace(" ", "  ").upper(), completion) for prompt, completion in numbers[:5]]
    assert kept(numbers + names + copies, "drop_near_duplicates", tmp_path) == numbers + names


def test_rows_below_the_threshold_are_kept(tmp_path: Path) -> None:
    rows = essays(1)
    words = rows[0][0].split()
    rows.append((" ".join(words[:40] + essays(1, seed=9)[0][0].split()[:40]), rows[0][1]))
    assert kept(rows, {"op": "drop_near_duplicates", "threshold": 0.8}, tmp_path) == rows


# --- sampling -------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 50), min_size=1), st.integers(1, 200))
def test_shares_are_as_equal_as_the_sources_allow(available: dict[str, int], rows: int) -> None:
    taken = shares(available, dict.fromkeys(available, 1), rows)
    assert sum(taken.values()) == min(rows, sum(available.values()))
    short = [taken[source] for source in available if taken[source] < available[source]]
    assert all(taken[source] <= available[source] for source in available)
    assert not short or max(taken.values()) - min(short) <= 1


def test_sampling_takes_the_same_number_of_every_source(tmp_path: Path) -> None:
    for name, count in (("big", 50), ("small", 5)):
        write_jsonl(
            tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {n}", "completion": "x"} for n in range(count)]
        )
    sources = [{"path": str(tmp_path / f"{name}.jsonl")} for name in ("big", "small")]
    manifest = curate(recipe(sources, {"op": "sample_rows", "rows": 20}), tmp_path / "dataset")
    assert manifest.rows_by_source == {"big": 15, "small": 5}
    other = curate(recipe(sources, {"op": "sample_rows", "rows": 20}, seed=1), tmp_path / "other")
    assert set(pairs_of(tmp_path / "other/train.parquet")) != set(
        pairs_of(tmp_path / "dataset/train.parquet")
    )
    assert other.rows == 20


def test_weights_and_temperature_set_the_mix_of_sources(tmp_path: Path) -> None:
    sizes = {"big": 400, "middle": 100, "small": 25}
    for name, count in sizes.items():
        write_jsonl(
            tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {n}", "completion": "x"} for n in range(count)]
        )
    sources = [{"path": str(tmp_path / f"{name}.jsonl")} for name in sizes]

    def mix(**settings: object) -> dict[str, int]:
        given = recipe(sources, {"op": "sample_rows", **settings})
        return curate(given, tmp_path / "dataset").rows_by_source

    assert mix(rows=42, temperature=1) == {"big": 32, "middle": 8, "small": 2}
    assert mix(rows=35, temperature=2) == {"big": 20, "middle": 10, "small": 5}
    assert mix(rows=60, weights={"big": 4}) == {"big": 40, "middle": 10, "small": 10}
    with pytest.raises(BadInput, match=r"weights is 'bigg': no row is of this source"):
        mix(rows=60, weights={"bigg": 4})


def test_sampling_by_score_takes_the_highest(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "completion": "x", "reward": (n * 7) % 10} for n in range(10)]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    operation = {"op": "sample_rows", "rows": 3, "by": "score"}
    curate(recipe([{"path": str(source), "score": "reward"}], operation), tmp_path / "dataset")
    best = {row["prompt"] for row in sorted(rows, key=lambda row: -int(str(row["reward"])))[:3]}
    assert {prompt for prompt, _ in pairs_of(tmp_path / "dataset/train.parquet")} == best
    with pytest.raises(BadInput, match=r"sources\.a\.score: has rows without a score"):
        curate(recipe([{"path": str(source)}], operation), tmp_path / "without")


def test_sampling_by_diversity_takes_one_of_each_kind(tmp_path: Path) -> None:
    kinds = ["horses run fast", "bread is baked", "stars shine bright", "rivers flow down"]
    rows = [(f"{kind} number{n}", "yes") for n in range(10) for kind in kinds]
    left = kept(rows, {"op": "sample_rows", "rows": 4, "by": "diversity"}, tmp_path)
    assert {prompt.rpartition(" ")[0] for prompt, _ in left} == set(kinds)


def test_a_cap_balances_the_answers_of_each_source(tmp_path: Path) -> None:
    rows = [(f"q{n}", "Yes" if n % 10 else "no") for n in range(100)]
    left = kept(rows, {"op": "cap_rows", "rows": 10}, tmp_path / "answer")
    assert [completion for _, completion in left].count("Yes") == 10
    assert [completion for _, completion in left].count("no") == 10
    assert len(kept(rows, {"op": "cap_rows", "per": "source", "rows": 7}, tmp_path / "source")) == 7


# --- meaning --------------------------------------------------------------------------------------


def test_prompts_with_equal_embeddings_are_one_and_the_first_stays(tmp_path: Path, base_model: Path) -> None:
    """With a tiny model of random weights: equal texts have equal embeddings, others have not."""
    model = tiny_base_model(tmp_path / "tiny", base_model) / "model"
    rows = [("Who won the race?", "Oca"), ("Where is it run?", "Siena"), ("Who won the race?", "the owl")]
    operation = {"op": "drop_semantic_duplicates", "model": str(model), "threshold": 0.999}
    assert kept(rows, operation, tmp_path) == rows[:2]


# --- conversations --------------------------------------------------------------------------------

CALM = ("Who won?", "The owl.", "When?", "In July.")


@pytest.mark.parametrize(
    ("operation", "talk"),
    [
        ("drop_refusals", ("Who won?", "As an AI, I pass.", "When?", "In July.")),
        (
            {"op": "drop_matches", "patterns": ["https?://"], "field": "prompt"},
            ("See http://a.b", *CALM[1:]),
        ),
        ({"op": "length_filter", "max_prompt": 40}, ("Who won? " * 5, *CALM[1:])),
        ({"op": "length_filter", "max_completion": 40}, (CALM[0], "The owl. " * 5, *CALM[2:])),
        ({"op": "token_length", "max": 30}, ("Who won? " * 10, *CALM[1:])),
        ("keep_languages", ("Chi ha vinto la corsa nella piazza principale della città?", *CALM[1:])),
        ("keep_quality", (" ".join(["Great deal!"] * 40), *CALM[1:])),
        ("drop_exact_duplicates", tuple(turn.upper() for turn in CALM)),
        ("drop_near_duplicates", tuple(f"{turn} " for turn in CALM)),
        ({"op": "sample_rows", "rows": 1, "by": "diversity"}, CALM),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_an_operation_judges_a_row_by_all_its_turns(
    operation: Operation, talk: tuple[str, ...], tmp_path: Path, base_model: Path
) -> None:
    assert talks_kept([CALM, talk], operation, tmp_path, base_model) == [CALM]


def test_markup_goes_from_every_turn(tmp_path: Path) -> None:
    marked = ("<p>Who won?</p>", "**The owl.**", "When?", "In&nbsp;July.")
    assert talks_kept([marked], "clean_markup", tmp_path) == [CALM]
    assert "<p>Who won?</p>' → 'Who won?'" in (tmp_path / "dataset/card.md").read_text()


def test_a_pattern_is_replaced_in_the_turns_of_its_field_alone(tmp_path: Path) -> None:
    operation = {"op": "replace_matches", "pattern": "owl", "by": "eagle", "field": "completion"}
    talk = ("The owl?", "The owl.", "The owl!", "An owl.")
    assert talks_kept([talk], operation, tmp_path) == [("The owl?", "The eagle.", "The owl!", "An eagle.")]


@pytest.mark.parametrize("operation", ["drop_exact_duplicates", "drop_near_duplicates", "drop_disagreement"])
def test_conversations_that_end_alike_and_began_otherwise_are_all_kept(
    operation: str, tmp_path: Path
) -> None:
    talks = [CALM, ("Who lost?", "The eagle.", *CALM[2:]), ("Who fell?", "The snail.", "When?", "In June.")]
    assert talks_kept(talks, operation, tmp_path) == talks


def talks_kept(
    talks: Sequence[tuple[str, ...]],
    operation: Operation,
    folder: Path,
    base_model: Path = Path("none"),
) -> list[tuple[str, ...]]:
    """What an operation leaves of the conversations, in their order."""
    source = write_jsonl(
        folder / "rows.jsonl", [{"id": n, "conversations": talk} for n, talk in enumerate(talks)]
    )
    curate(recipe([{"path": str(source), "format": "lima"}], operation), folder / "dataset", base_model)
    table = pq.read_table(folder / "dataset/train.parquet").to_pylist()
    return [
        (*row["history"], row["prompt"], row["completion"])
        for row in sorted(table, key=lambda row: int(row["id"]))
    ]
