"""The texts of errors, wherever they are raised: what is wrong with many of them at once."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastkd
from fastkd.cache.errors import said, type_name
from fastkd.kernels.errors import type_name as kernels_type_name
from fastkd.utils.text import are_missing, numbered, them

_ROOT = Path(__file__).parents[1]
_FILES = [path for folder in ("fastkd", "cache", "kernels", "bench") for path in sorted((_ROOT / folder).rglob("*.py"))]


@pytest.fixture(scope="module")
def trees() -> list[tuple[Path, ast.Module]]:
    assert Path(fastkd.__file__).is_relative_to(_ROOT)
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in _FILES]


def parts(tree: ast.AST) -> Iterator[tuple[int, str, ast.expr, str]]:
    """The values in f-strings: line, the text before, the value, and the text behind."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            for i, one in enumerate(node.values):
                if isinstance(one, ast.FormattedValue):
                    around = [node.values[k] if 0 <= k < len(node.values) else None for k in (i - 1, i + 1)]
                    before, behind = (a.value if isinstance(a, ast.Constant) else "" for a in around)
                    yield node.lineno, str(before), one.value, str(behind)


def test_no_message_says_nonetype(trees: list[tuple[Path, ast.Module]]) -> None:
    """`got {type(x).__name__}; expected` is "got NoneType" if x is None: use `type_name`."""
    wrong = [
        f"{path.relative_to(_ROOT)}:{line}"
        for path, tree in trees
        for line, before, value, behind in parts(tree)
        if re.search(r"(got|found)( a)? $", before)
        and re.fullmatch(r"type\(\w+\).__name__", ast.unparse(value))
        and (behind.startswith("; expected") or not before.endswith(" a "))
    ]
    assert wrong == []


def test_no_message_has_two_full_stops(trees: list[tuple[Path, ast.Module]]) -> None:
    """An error within a sentence may end with a full stop of its own: `{said(error)}.`"""
    wrong = []
    for path, tree in trees:
        for handler in ast.walk(tree):
            if not isinstance(handler, ast.ExceptHandler) or handler.name is None:
                continue
            for line, _, value, behind in parts(handler):
                plain = isinstance(value, ast.Name) and value.id == handler.name
                text = isinstance(value, ast.Call) and ast.unparse(value) in (
                    f"str({handler.name})",
                    f"words({handler.name})",
                )
                if (plain or text) and re.match(r"\.( |$)", behind):
                    wrong.append(f"{path.relative_to(_ROOT)}:{line}")
    allowed = [one for one in wrong if one.startswith("fastkd/sweep/result.py")]  # {error!r} ends with a bracket
    assert [one for one in wrong if one not in allowed] == []


def test_one_shard_is_no_shards(trees: list[tuple[Path, ast.Module]]) -> None:
    """`numbered` and `are_missing` know how many they are."""
    wrong = [
        f"{path.relative_to(_ROOT)}:{line}"
        for path, tree in trees
        for line, before, value, _ in parts(tree)
        if before.endswith("shards ") and ast.unparse(value).startswith("ranges(")
    ]
    assert wrong == []
    assert (numbered("shard", [[3, 3]]), numbered("shard", [[3, 4]])) == ("shard 3", "shards 3-4")
    assert are_missing([[2, 2]]) == "shard 2 is missing"
    assert are_missing([[2, 2], [5, 7]]) == "shards 2, 5-7 are missing"
    assert (them([[2, 2]]), them([[2, 3]])) == ("it", "them")


def test_the_words_for_values_and_errors() -> None:
    assert (
        [type_name(one) for one in (None, 1, "x")]
        == ["None", "int", "str"]
        == [kernels_type_name(one) for one in (None, 1, "x")]
    )
    assert said(ValueError("no.\n  Really.")) == "no. Really"
    assert said("and so on ...") == "and so on ..."


def test_errors_of_functions_name_arguments_and_not_options(trees: list[tuple[Path, ast.Module]]) -> None:
    """`features: got ...`: in a program it is the argument; the command line makes the option of it."""
    wrong = []
    for path, tree in trees:
        if (
            path.relative_to(_ROOT).parts[:2] in (("fastkd", "cli"), ("fastkd", "integrations"))
            or "bench" in path.parts
        ):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args and ast.unparse(node.func).endswith("Error"):
                first = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
                if isinstance(first, ast.Constant) and str(first.value).startswith("--"):
                    wrong.append(f"{path.relative_to(_ROOT)}:{node.lineno}")
    assert wrong == []
