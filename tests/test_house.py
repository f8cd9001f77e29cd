"""Rules of the house that no linter knows."""

import ast
import re
from pathlib import Path

import pytest
from walk import modules

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "ddim_pl").rglob("*.py"), *(ROOT / "callbacks").glob("*.py")])
LONGEST_FUNCTION = 40
LONGEST_TEST_FILE = 600


def code_lines(function: ast.FunctionDef, lines: list[str]) -> int:
    """Lines of a function, its signature included, without docstrings, comments and blanks."""
    docs: set[int] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            docs |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    own = range(function.lineno, (function.end_lineno or 0) + 1)
    texts = [lines[i - 1].strip() for i in own if i not in docs]
    return sum(bool(text) and not text.startswith("#") for text in texts)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_is_long(path):
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert code_lines(node, text.splitlines()) <= LONGEST_FUNCTION, node.name


def test_no_test_file_is_long():
    for path in (ROOT / "tests").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= LONGEST_TEST_FILE, path


def test_tests_mirror_the_packages():
    """A test file is named after a module in the same place; a few are about the whole."""
    whole = {"tests/test_house.py", "tests/test_public_names.py", "tests/golden/test_golden.py"}
    whole |= {"tests/test_docs.py", "tests/test_failures.py", "tests/test_fuzz.py"}
    whole |= {"tests/samplers/test_against_diffusers.py", "tests/training/test_gamma_training.py"}
    whole |= {"tests/cli/test_configs.py", "tests/cli/test_help.py", "tests/cli/test_fuzz.py"}
    whole |= {"tests/training/test_waits.py"}
    whole |= {"tests/callbacks/test_likelihood_callback.py"}  # tests/test_likelihood.py is another
    for path in (ROOT / "tests").rglob("test_*.py"):
        place = path.relative_to(ROOT / "tests")
        if f"tests/{place}" in whole:
            continue
        name = place.name.removeprefix("test_")
        parents = place.parent if str(place.parent) != "cli" else Path()
        homes = [ROOT / "ddim_pl" / parents / name, ROOT / parents / name]
        assert any(home.is_file() for home in homes), path


def test_every_module_says_what_it_is():
    for module in modules():
        assert module.__doc__, module.__name__


def test_no_error_message_ends_in_a_full_stop():
    """One dialect: "name must be ..., got ...: remedy"."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                text = ast.unparse(node.exc.args[0]).rstrip("'\"")
                assert not text.endswith("."), (path, text)


def test_every_paper_cited_is_in_the_references():
    known = set(
        re.findall(r"^- \*\*\[(.+?)\]\*\*", (ROOT / "docs/references.md").read_text(), re.M)
    )
    cited = set()
    for path in SOURCES:
        text = path.read_text()
        cited |= set(
            re.findall(r"\[([A-Z][\w+-]+)\](?:,\s+(?:eq|section|appendix|alg|table|their))", text)
        )
        cited |= set(re.findall(r"\(\[([A-Z][\w+-]+)\]", text))
        assert not re.search(r"\b[A-Z]\w+ (et al\.|& [A-Z]\w+) 20\d\d", _cited_text(path)), path
    assert len(cited) > 10
    assert len(known) > 30
    assert cited <= known


def _cited_text(path: Path) -> str:
    """A module without the papers on Gamma variables, which have no key."""
    text = path.read_text()
    for name in ("Laurent & Massart 2000", "Walker & Ni 2011"):
        text = text.replace(name, "")
    return text
