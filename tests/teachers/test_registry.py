"""A kind of teacher from outside the package is one file that calls `register_teacher`."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

import fastkd
from fastkd.cache import open_cache
from fastkd.cli.main import main
from fastkd.errors import TeacherError
from fastkd.settings import DataSettings, ModelSettings
from fastkd.teachers import Hidden, LMHead, Teacher, TopK, register_teacher, registry
from fastkd.teachers.load import load, load_teacher
from fastkd.teachers.module import ModuleTeacher

TOY = '''
import torch
from fastkd.teachers import Hidden, LMHead, register_teacher

class Toy:
    """Repeats its inputs."""
    vocab_size, max_positions = 11, None
    def __init__(self, name, settings):
        self.fingerprint, self.device = f"toy {name}", torch.device(settings.device)
        self.scale = float(name)
    def __call__(self, inputs):
        return Hidden(self.scale * torch.nn.functional.one_hot(inputs, 11).float(), LMHead(torch.eye(11)))

@register_teacher("toy")
def load_toy(name, settings):
    return Toy(name, settings)
'''


@pytest.fixture(autouse=True)
def kinds(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found: dict[str, Any] = {}
    monkeypatch.setattr(registry, "_loaders", found)
    return found


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with a toy teacher."""
    (tmp_path / "toy_teacher.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "toy_teacher", raising=False)
    return "toy_teacher"


def test_a_registered_kind_is_captured(toy: str, tmp_path: Path) -> None:
    __import__(toy)
    (tmp_path / "data.jsonl").write_text('{"tokens": [1, 2, 3, 10]}\n{"tokens": [4, 4]}\n')
    data = DataSettings(data=(str(tmp_path / "data.jsonl"),))
    loaded = load("toy:3", ModelSettings(device="cpu"), data, rank=0, world_size=1)
    fastkd.capture(loaded.teacher, loaded.data, tmp_path / "out", k=2, draws=0)
    cache = open_cache(tmp_path / "out")
    assert cache.spec.teacher == "toy 3"
    for index in cache.shards:
        arrays = cache.read_shard(index)
        assert arrays["ids"][:, 0].tolist() == arrays["tokens"].tolist()
        assert arrays["logprobs"][:, 0] == pytest.approx(3 - torch.log(torch.tensor(10 + torch.e**3)).item(), abs=0.05)


def test_capture_takes_its_name(toy: str, tmp_path: Path) -> None:
    __import__(toy)
    assert fastkd.capture("toy:3", [[1, 2]], tmp_path / "out", k=2).complete


def test_an_entry_point_of_an_installed_package(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def entry_points(*, group: str, name: str) -> list[EntryPoint]:
        return [EntryPoint("toy", f"{toy}:load_toy", group)] if (group, name) == ("fastkd.teachers", "toy") else []

    monkeypatch.setattr(registry, "entry_points", entry_points)
    teacher = load_teacher("toy:2", ModelSettings(device="cpu"))
    assert teacher.fingerprint == "toy 2"
    with pytest.raises(TeacherError, match="nokind:2: there is no such"):
        load_teacher("nokind:2", ModelSettings(device="cpu"))


def test_a_loader_may_return_a_module(kinds: dict[str, Any]) -> None:
    @register_teacher("net")
    def load_net(name: str, settings: ModelSettings) -> torch.nn.Module:
        return torch.nn.Embedding(5, int(name))

    assert kinds == {"net": load_net}
    teacher = load_teacher("net:7")
    assert isinstance(teacher, ModuleTeacher)
    assert teacher.vocab_size == 7


def test_kinds_that_cannot_be_registered() -> None:
    register_teacher("twice")(lambda name, settings: None)
    with pytest.raises(TeacherError, match="'twice': already registered by"):
        register_teacher("twice")(lambda name, settings: None)
    with pytest.raises(TeacherError, match="got 'a:b'; expected letters"):
        register_teacher("a:b")(lambda name, settings: None)


def test_the_address_of_a_server_is_stored_and_shown_without_its_credentials(tmp_path: Path, capfd: Any) -> None:
    """The canary is in the name, and in the fingerprint that the loader makes of it."""

    @register_teacher("far")
    def load_far(name: str, settings: ModelSettings) -> ModuleTeacher:
        torch.manual_seed(0)
        return ModuleTeacher(torch.nn.Embedding(9, 9), vocab_size=9, fingerprint=f"far {name}")

    (tmp_path / "data.jsonl").write_text('{"tokens": [1, 2, 3, 8]}\n')
    teacher, out = "far:https://me:canary1@host/model?signature=canary2", tmp_path / "out"
    command = ["--teacher", teacher, "--data", str(tmp_path / "data.jsonl")]
    for more in (["capture", "--json", "--out", str(out)], ["capture", "--out", str(out)], ["plan", "--seconds", "0"]):
        assert main([*more, *command, "--k", "3"]) == 0
    assert main(["verify", str(out), "--teacher", teacher]) == 0
    assert main(["capture", *command, "--out", str(out), "--k", "4"]) == 1
    assert main(["capture", *command[:3], "https://me:canary3@host/a.jsonl?token=canary4", "--out", str(out)]) == 1
    assert main(["capture", "--teacher", "https://me:canary1@host/m", *command[2:], "--out", str(out)]) == 1
    shown = capfd.readouterr()
    assert "canary" not in shown.out + shown.err
    for path in out.rglob("*"):
        assert path.is_dir() or b"canary" not in path.read_bytes()
    assert "host/model" in open_cache(out).spec.teacher


def test_the_old_name_of_the_lm_head() -> None:
    output = Hidden(torch.zeros(1, 2), LMHead(torch.zeros(3, 2)))
    with pytest.warns(DeprecationWarning, match="use Hidden.lm_head"):
        assert output.head is output.lm_head
    assert {Teacher.__name__, TopK.__name__} == {"Teacher", "TopK"}
