"""Folders that take the place of others: at each moment one of both is there, or comes back."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastkd.utils import atomic
from fastkd.utils.atomic import clean, commit_folder, start_folder


def killed_at(moment: int, work: Callable[[], object]) -> bool:
    """Do it in a process that ends, without any clean-up, before that rename or removal. Whether it came so far."""
    child = os.fork()
    if not child:
        done = 0

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*given: Any, **named: Any) -> Any:
                nonlocal done
                done += 1
                if done > moment:
                    os._exit(9)
                return function(*given, **named)

            return call

        os.rename, os.unlink, os.rmdir = counted(os.rename), counted(os.unlink), counted(os.rmdir)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def replace(final: Path, text: str) -> None:
    temporary = start_folder(final)
    for name in ("a", "b"):
        (temporary / name).write_text(text)
    commit_folder(final)


def test_a_kill_while_a_folder_is_replaced_leaves_one_of_both(tmp_path: Path) -> None:
    final, seen, moment, killed = tmp_path / "step-7", set(), 0, True
    while killed:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        replace(final, "old")
        killed = killed_at(moment, lambda: replace(final, "new"))
        clean(tmp_path)
        assert os.listdir(tmp_path) == ["step-7"]
        texts = {(final / name).read_text() for name in ("a", "b")}
        assert len(texts) == 1
        seen |= texts
        moment += 1
    assert seen == {"old", "new"}
    assert moment > 4  # two renames, and what is removed of the old one


def test_an_older_one_that_was_left_is_not_taken_for_the_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "step-7"
    replace(final, "old")
    with monkeypatch.context() as patch:
        patch.setattr(atomic.shutil, "rmtree", lambda _: None)
        replace(final, "new")
    assert len(os.listdir(tmp_path)) == 2
    clean(tmp_path)
    assert [path.read_text() for path in sorted(final.iterdir())] == ["new", "new"]
    assert os.listdir(tmp_path) == ["step-7"]
