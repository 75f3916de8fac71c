"""The code keeps to the architecture: one table of steps, one layout, imports that point down only, functions
that fit on a screen."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import palio
from palio.packaging.container import CODE
from palio.pipeline import STEPS

PACKAGE = Path(palio.__file__).parent
LAYOUT = PACKAGE / "layout.py"
MODULES = sorted(PACKAGE.rglob("*.py"))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def located(path: Path, node: ast.expr) -> str:
    return f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)[:100]}"


# --- paths -----------------------------------------------------------------------------------------------


def text_of(node: ast.AST) -> str | None:
    """A string literal, with {} for what an f-string fills in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        return "".join(str(part) for part in parts)
    return None


def path_parts(tree: ast.Module) -> Iterator[tuple[ast.expr, str]]:
    """Every literal that becomes part of a path: an operand of `/`, an argument of Path or of a glob."""
    for node in ast.walk(tree):
        literals: list[ast.expr] = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            literals = [node.left, node.right]
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("At", "Path", "glob", "rglob", "joinpath", "with_name"):
                literals = node.args
        for literal in literals:
            if (text := text_of(literal)) is not None:
                yield literal, text


def names_in_layout() -> set[str]:
    """Names of files and folders that the layout spells."""
    parts = (part for _, text in path_parts(parsed(LAYOUT)) for part in text.split("/"))
    return {part for part in parts if part and part != "{}"}


# Of formats that others define, not of the project's layout: Hugging Face's, HELM's, a team's contract.
FOREIGN = {"README.md", "config", "palio"}


def misplaced_paths(path: Path, names: set[str]) -> list[str]:
    return [
        located(path, node)
        for node, text in path_parts(parsed(path))
        if any(part in names - FOREIGN for part in text.split("/"))
    ]


def test_only_the_layout_spells_paths_of_the_project() -> None:
    names = names_in_layout()
    assert {"results", "work", "adapter.json", "stage.json"} <= names
    wrong = [line for path in MODULES if path != LAYOUT for line in misplaced_paths(path, names)]
    assert wrong == [], "\n".join(wrong)


def test_a_path_spelled_elsewhere_is_found() -> None:
    names = names_in_layout()
    for code in ('folder / "adapter.json"', 'Path("results/x")', 'work.glob("*/answers.jsonl")'):
        assert [text for _, text in path_parts(ast.parse(code)) if set(text.split("/")) & names], code


# --- steps -----------------------------------------------------------------------------------------------


def lists_of_steps(tree: ast.Module) -> Iterator[ast.expr]:
    """Literals that enumerate steps: three of their names, rules or records, or more."""
    names = {step.name for step in STEPS}
    rules = {step.rule for step in STEPS}
    for node in ast.walk(tree):
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            items: list[ast.expr | None] = list(node.elts)
        elif isinstance(node, ast.Dict):
            items = list(node.keys)
        else:
            continue
        texts = {item.value for item in items if isinstance(item, ast.Constant)}
        if len(texts & names) > 2 or len(texts & rules) > 2:
            yield node


def test_nobody_keeps_a_second_list_of_steps() -> None:
    wrong = [
        located(path, node)
        for path in MODULES
        if path.name != "pipeline.py"
        for node in lists_of_steps(parsed(path))
    ]
    assert wrong == [], "\n".join(wrong)


def test_a_second_list_of_steps_is_found() -> None:
    assert list(lists_of_steps(ast.parse('("check", "curate", "finetune")')))
    assert list(lists_of_steps(ast.parse('{"open": 1, "closed": 2, "package": 3}')))


# --- imports ---------------------------------------------------------------------------------------------

LEVELS = (
    {"errors", "layout", "markup"},
    {"cpu", "credentials", "provenance", "incoming", "files", "guard", "limits", "network", "text"},
    {"config"},
    {"records", "entries"},
    {"settings"},
    {"pipeline"},
    {"base_model", "causal_model", "demo", "gpu", "heartbeat", "quantization", "sandbox"}
    | {"model_code", "tensors", "tokens", "vllm"},
    {"curation", "training", "packaging", "serving", "evaluation", "eligibility", "scoring", "report"},
    {"answers", "feedback", "neurips2023", "release", "operating", "participant", "planning", "site"}
    | {"inside", "workflow", "steps"},
    {"cli"},
)
"""Packages and modules of `palio`, from the lowest level up: each imports lower ones only."""
ROOMS = LEVELS[7]
"""The steps' own packages: they do not import each other."""


def imported(tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    """Every package or module of palio that is imported, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "palio":
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("palio."):
            yield node, str(node.module).split(".")[1]


def level(name: str) -> int:
    return next(number for number, names in enumerate(LEVELS) if name in names)


def test_imports_point_down_only() -> None:
    wrong = []
    for path in MODULES:
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for node, name in imported(parsed(path)):
            if name in (own, "__version__"):
                continue
            same_level = level(name) == level(own) and own not in ROOMS
            if level(name) > level(own) or (level(name) == level(own) and not same_level):
                wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno} imports palio.{name}")
    assert wrong == [], "\n".join(wrong)


def test_the_container_that_serves_has_all_that_its_code_imports() -> None:
    """The CLI is left out: it imports each command's own code only when asked for it."""
    shipped = {name.removesuffix(".py") for name in CODE}
    missing = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} imports palio.{name}; add it to palio.packaging.container"
        for path in MODULES
        if path.relative_to(PACKAGE).parts[0].removesuffix(".py") in shipped - {"cli"}
        for node, name in imported(parsed(path))
        if name not in shipped | {"__version__"}
    ]
    assert missing == [], "\n".join(missing)


# --- functions -------------------------------------------------------------------------------------------

MOST_LINES = 40
"""Of a function's body, its docstring aside."""


def long_functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if body and (body[-1].end_lineno or 0) - body[0].lineno >= MOST_LINES:
                yield node


def test_every_function_fits_on_a_screen() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}:{function.lineno} {function.name}"
        for path in MODULES
        for function in long_functions(parsed(path))
    ]
    assert wrong == [], "\n".join(wrong)


def test_a_function_that_is_longer_is_found() -> None:
    def of(lines: int) -> ast.Module:
        return ast.parse('def f():\n    """A\n    docstring."""\n' + "    pass\n" * lines)

    assert list(long_functions(of(MOST_LINES))) == []
    assert [one.name for one in long_functions(of(MOST_LINES + 1))] == ["f"]
