"""The demo's training sources: four task families, published with the noise of data from the web.

    palio demo-data --out resources/demo_sources --seed 7

The families have the form of the HELM 0.5.16 scenarios that the demo is evaluated on, and nothing else
of them: the generators, words and random streams are ours. No row can be an evaluation instance:

| family                | HELM scenario                                  | why none is an instance of it    |
|-----------------------|------------------------------------------------|----------------------------------|
| pattern_match         | synthetic_reasoning:mode=pattern_match         | other nouns                      |
| variable_substitution | synthetic_reasoning:mode=variable_substitution | other nouns                      |
| parity                | simple_classification                          | more digits                      |
| natural_reasoning     | synthetic_reasoning_natural:difficulty=easy    | other subjects                   |

Of every problem several lines are published (`published`), as if collected from sites that copy each
other, in a random order:

- 85 % are copied: the right answer two or three times, and none, one or two wrong answers, each once.
  So the wrong ones lose against the most frequent answer.
- 15 % stand alone on one line, which is wrong in 3 of 10 cases: nothing in the data tells.
- Every second copy of a right answer is altered in markup, white space or the instruction's case.
- On average one refusal for every 12 problems.

About 30 % of the lines have a wrong answer (of parity, which has one wrong answer only, about 24 %).
`solve` recomputes the right one from any line's prompt.
"""

from __future__ import annotations

import html
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from palio.layout import DemoSources
from palio.provenance import write_text


def _words(text: str) -> list[str]:
    return text.split()


LICENCE, GENERATOR = "CC0-1.0", "palio demo-data"
"""As an entry states them of this data."""
SOLVE = "Please solve the following problem."
CLASSIFY = 'Classify the following numbers by their parity. The classes are "Even" and "Odd".'
NOUNS = _words(
    "badger beaver camel crow donkey eel falcon ferret goose heron lynx moth otter owl puma raven "
    "robin swan trout turkey viper wasp wolf yak almond apricot cherry date fig lemon lime mango "
    "melon olive orange papaya plum quince"
)
RULE_SYMBOLS = "XYZ"
MATH_SYMBOLS = "+-*="
PEOPLE = _words("Grace Heidi Ivan Judy Karl Laura Mike Nina Oscar Peggy")
THINGS = _words("fox goat horse moose otter pig raccoon seal sheep wolf cactus daisy fern lily oak tulip")
ATTRIBUTES = _words(
    "angry bad big blue boring brave bright calm clean cold dark empty fast gentle good green happy "
    "heavy hot light loud noisy old quiet red rich sad scary shy slow small smart soft strong tall "
    "tired warm weak wet young"
)
MIRRORS = ("archive", "forum", "homework", "wiki")
REFUSALS = (
    "I'm sorry, but as an AI language model I cannot solve this.",
    "As an AI, I am not able to answer that.",
    "I cannot help with this request.",
)
COPIED = 0.85
LONE_WRONG = 0.3
REFUSED = 1 / 12


@dataclass(frozen=True)
class Problem:
    """One question of a family, in the words of HELM's adapter."""

    question: str
    """With its prefix, up to where the answer begins."""
    answer: str
    """As the model has to continue, with the blank before it if there is one."""


# --- pattern_match and variable_substitution ------------------------------------------------------


def _pattern(draw: random.Random) -> list[str]:
    pattern = draw.choices(RULE_SYMBOLS, k=draw.randint(2, 3)) + draw.choices(
        MATH_SYMBOLS, k=draw.randint(2, 3)
    )
    draw.shuffle(pattern)
    return pattern


def _substitution(draw: random.Random, pattern: list[str]) -> dict[str, str]:
    symbols = sorted(set(pattern) & set(RULE_SYMBOLS))
    return {symbol: " ".join(draw.choices(NOUNS, k=draw.randint(1, 2))) for symbol in symbols}


def _matches(pattern: str, result: str) -> bool:
    """Whether one or two words for each rule symbol turn `pattern` into `result`."""
    expression = ""
    for symbol in pattern.split():
        if symbol not in RULE_SYMBOLS:
            part = re.escape(symbol)
        elif f"<{symbol}>" in expression:
            part = f"(?P={symbol})"
        else:
            part = rf"(?P<{symbol}>\w+(?: \w+)?)"
        expression += (" " if expression else "") + part
    return re.fullmatch(expression, result) is not None


def pattern_match(draw: random.Random) -> Problem:
    while True:
        pattern = _pattern(draw)
        substitution = _substitution(draw, pattern)
        result = " ".join(substitution.get(symbol, symbol) for symbol in pattern)
        choices = {" ".join(pattern)}
        for _ in range(50):
            other = draw.sample(pattern, len(pattern))
            if len(choices) < 4 and not _matches(" ".join(other), result):
                choices.add(" ".join(other))
        if len(choices) == 4:
            shown = sorted(choices)
            draw.shuffle(shown)
            question = f"Rules: {' | '.join(shown)} | Result: {result}\nTarget:"
            return Problem(question, " " + " ".join(pattern))


def _solve_pattern_match(question: str) -> str:
    rules, result = re.fullmatch(r"Rules: (.*) \| Result: (.*)\nTarget:", question).groups()  # type: ignore[union-attr]
    return " " + next(pattern for pattern in rules.split(" | ") if _matches(pattern, result))


def _mistake_pattern_match(draw: random.Random, problem: Problem) -> str:
    rules = problem.question.removeprefix("Rules: ").split(" | ")[:-1]
    return " " + draw.choice([pattern for pattern in rules if pattern != problem.answer.strip()])


def variable_substitution(draw: random.Random) -> Problem:
    pattern = _pattern(draw)
    substitution = _substitution(draw, pattern)
    shown = " , ".join(f'{symbol} by " {words} "' for symbol, words in substitution.items())
    question = f"Rules: {' '.join(pattern)} | Substitutions: {shown}\nTarget:"
    return Problem(question, " " + " ".join(substitution.get(symbol, symbol) for symbol in pattern))


def _solve_variable_substitution(question: str) -> str:
    pattern = question.removeprefix("Rules: ").partition(" | ")[0].split()
    substitution = dict(re.findall(r'(\w) by " (.*?) "', question))
    return " " + " ".join(substitution.get(symbol, symbol) for symbol in pattern)


def _mistake_variable_substitution(draw: random.Random, problem: Problem) -> str:
    words = problem.answer.split()
    place = draw.randrange(len(words))
    if draw.random() < 0.5:
        return " " + " ".join(words[:place] + words[place + 1 :])
    words[place] = draw.choice([word for word in NOUNS if word != words[place]])
    return " " + " ".join(words)


# --- parity ---------------------------------------------------------------------------------------


def parity(draw: random.Random) -> Problem:
    number = draw.randint(100, 9999)
    return Problem(f"Number: {number}\nParity:", " Odd" if number % 2 else " Even")


def _solve_parity(question: str) -> str:
    number = int(question.removeprefix("Number: ").partition("\n")[0])
    return " Odd" if number % 2 else " Even"


def _mistake_parity(draw: random.Random, problem: Problem) -> str:
    return " Even" if problem.answer == " Odd" else " Odd"


# --- natural_reasoning ----------------------------------------------------------------------------


def natural_reasoning(draw: random.Random) -> Problem:
    """Five rules about one subject and a fact of two attributes; one problem in ten allows no conclusion."""
    person = draw.random() < 1 / 3
    name = draw.choice(PEOPLE if person else THINGS)
    some, the = (name, name) if person else (f"{'an' if name[0] in 'aeiou' else 'a'} {name}", f"the {name}")
    attributes = draw.sample(ATTRIBUTES, len(ATTRIBUTES))
    rules = []
    for _ in range(5):
        condition = [attributes.pop() for _ in range(draw.randint(1, 2))]
        joined = f" {draw.choice(['and', 'or'])} ".join(condition)
        rules.append(f"If {some} is {joined}, then {the} is {attributes.pop()}.")
    empty = draw.random() < 0.1
    while True:
        fact = f"{the[0].upper()}{the[1:]} is {' and '.join(draw.sample(ATTRIBUTES, 2))}."
        question = (
            "Rules:\n" + "\n".join(rules) + f"\nFact:\n{fact}\nThe following can be determined about {the}:\n"
        )
        answer = _solve_natural_reasoning(question)
        if (answer == "Nothing.") == empty:
            return Problem(question, answer)


def _solve_natural_reasoning(question: str) -> str:
    subject, facts = re.search(r"\nFact:\n(.*?) is (.*)\.\n", question).groups()  # type: ignore[union-attr]
    known = set(facts.split(" and "))
    found = []
    for condition, conclusion in re.findall(r"^If .*? is (.*), then .*? is (.*)\.$", question, re.MULTILINE):
        needed = set(re.split(" and | or ", condition))
        if (needed & known if " or " in condition else needed <= known) and conclusion not in known:
            found.append(conclusion)
    return f"{subject} is {' and '.join(found)}." if found else "Nothing."


def _mistake_natural_reasoning(draw: random.Random, problem: Problem) -> str:
    subject = re.search(r"\nFact:\n(.*?) is ", problem.question)[1]  # type: ignore[index]
    mentioned = re.findall(r" is (\w+)[.,]", problem.question)
    return f"{subject} is {draw.choice([word for word in mentioned if word not in problem.answer.split()])}."


# --- the families ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    instruction: str
    problem: Callable[[random.Random], Problem]
    solve: Callable[[str], str]
    """The right answer to a question."""
    mistake: Callable[[random.Random, Problem], str]
    """A wrong answer that looks right."""
    question: str
    """How every question begins."""


FAMILIES: dict[str, Family] = {
    "pattern_match": Family(SOLVE, pattern_match, _solve_pattern_match, _mistake_pattern_match, "Rules: "),
    "variable_substitution": Family(
        SOLVE, variable_substitution, _solve_variable_substitution, _mistake_variable_substitution, "Rules: "
    ),
    "parity": Family(CLASSIFY, parity, _solve_parity, _mistake_parity, "Number: "),
    "natural_reasoning": Family(
        SOLVE, natural_reasoning, _solve_natural_reasoning, _mistake_natural_reasoning, "Rules:\n"
    ),
}


def prompt(family: Family, problem: Problem) -> str:
    """As HELM's adapter writes it without solved examples: the instruction, the question."""
    return f"{family.instruction}\n\n{problem.question}"


def solve(family: str, prompt: str) -> str:
    """The right completion of any prompt of `family`: the truth that a curation is measured with."""
    given = FAMILIES[family]
    return given.solve(given.question + prompt.rpartition(given.question)[2])


# --- the noise ------------------------------------------------------------------------------------


def _marked_up(draw: random.Random, text: str) -> str:
    """The same text as HTML or Markdown would carry it."""
    kind = draw.randrange(3)
    if kind == 0:
        return f"<p>{html.escape(text)}</p>".replace("\n", "<br>\n")
    if kind == 1:
        return f"<div class='question'>{html.escape(text)}</div>"
    head, line, rest = text.partition("\n")
    return f"**{head}**{line}{rest}"


def _spaced(draw: random.Random, text: str) -> str:
    """Some blanks doubled, never the first character."""
    return text[0] + "".join(
        character * 2 if character == " " and draw.random() < 0.3 else character for character in text[1:]
    )


def _altered(draw: random.Random, prompt: str, completion: str) -> tuple[str, str]:
    kind = draw.randrange(4)
    if kind == 0:
        return _marked_up(draw, prompt), completion
    if kind == 1:
        return _marked_up(draw, prompt), re.sub(r"^( ?)(.*)$", r"\1<b>\2</b>", html.escape(completion))
    if kind == 2:
        return _spaced(draw, prompt), completion
    head, line, rest = prompt.partition("\n")
    return head.upper() + line + rest, completion


def published(name: str, draw: random.Random, rows: int) -> list[tuple[str, str]]:
    """Prompt and completion of every line about `rows` different problems, in the order of publication."""
    family = FAMILIES[name]
    problems: dict[str, Problem] = {}
    while len(problems) < rows:
        problem = family.problem(draw)
        problems.setdefault(problem.question, problem)
    lines: list[tuple[str, str]] = []
    for problem in problems.values():
        text = prompt(family, problem)
        right = (text, problem.answer)
        if draw.random() < COPIED:
            lines.append(right)
            for copy in range(draw.randint(1, 2)):
                lines.append(_altered(draw, *right) if (len(lines) + copy) % 2 else right)
            # Different mistakes, so that none of them is as frequent as the right answer.
            mistakes = {family.mistake(draw, problem) for _ in range(draw.choice((0, 1, 1, 2, 2)))}
            lines += [(text, mistake) for mistake in sorted(mistakes)]
        else:
            wrong = draw.random() < LONE_WRONG
            lines.append((text, family.mistake(draw, problem)) if wrong else right)
        if draw.random() < REFUSED:
            lines.append((text, " " + draw.choice(REFUSALS)))
    draw.shuffle(lines)
    return lines


def write_demo_sources(out: Path, seed: int, rows: int = 150) -> None:
    """Write `out`/<family>.jsonl for every family.

    Args:
        seed: with the family's name the seed of its random stream; equal seeds give equal files.
        rows: different problems of each family; about three times as many lines are published.
    """
    for name in FAMILIES:
        draw = random.Random(f"{seed}/{name}")
        lines = [
            {
                "id": f"{name}-{number:05}",
                "prompt": text,
                "completion": completion,
                "site": draw.choice(MIRRORS),
            }
            for number, (text, completion) in enumerate(published(name, draw, rows))
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(DemoSources(out).source(name), text)
