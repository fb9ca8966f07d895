"""A teacher divided over processes says what it says in one; and processes find those of their worker, no others."""

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from forked import Forked
from hf_cases import VOCAB, saved

from fastkd.cache import CacheError
from fastkd.errors import TeacherError, WorkRemains
from fastkd.kernels.lm_head import LMHead
from fastkd.models.lm_head import logits_of
from fastkd.models.protocol import Hidden
from fastkd.teachers.hf import load_hf
from fastkd.teachers.tensor_parallel import LeaderFailed, ParallelGroup, heeding_others, join_group, led

# softcap and windows; scale and a head that is the embedding; a bias; experts
DIVISIBLE = ["llama", "gemma2", "cohere", "phi", "mixtral"]


END = "\nfrom fastkd.utils.signals import end\nend(0)\n"


def processes(code: str, count: int, arguments: list[str], environment: dict[str, str] | None = None) -> list[str]:
    """Run code in some processes, which have `rank` and `arguments`; what each printed."""
    running = [Forked(forked.code, code + END, rank, arguments, **(environment or {})) for rank in range(count)]
    try:
        found = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, found, strict=True):
        assert process.returncode == 0, errors
    return [out for out, _ in found]


def some_tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (3, 14), generator=torch.Generator().manual_seed(5))


DIVIDED = """
import torch
from pathlib import Path
from fastkd.errors import TeacherError
from fastkd.teachers.hf import load_hf
from fastkd.teachers.tensor_parallel import join_group
from fastkd.teachers.protocol import Hidden
from test_teacher_parallel import DIVISIBLE, some_tokens
folder = Path(arguments[0])
group = join_group(rank, 2, 2, device="cpu", rendezvous=f"file://{folder}/meet")
tokens = group.share(some_tokens() if group.leader else None)
found = {}
for name in DIVISIBLE:
    teacher = load_hf(folder / name, parallel=group)
    with torch.inference_mode():
        output = teacher(tokens)
        flat = output.states.flatten(0, 1)
        # as capture does it, some rows at a time
        logits = torch.cat([output.lm_head(rows) for rows in flat.split(10)])
    weight = teacher.model.get_output_embeddings().weight
    found[name] = {
        "states": output.states, "logits": logits, "vocab": teacher.vocab_size, "fingerprint": teacher.fingerprint,
        "here": weight.to_local().shape[0], "notes": teacher.notes,
    }
for name in ("gpt2", "odd"):
    try:
        load_hf(folder / name, parallel=group)
    except TeacherError as error:
        found[name] = str(error)
torch.save(found, folder / f"{rank}.pt")
group.leave()
"""


def test_a_divided_teacher_says_the_same(tmp_path: Path) -> None:
    for name in DIVISIBLE:
        saved(tmp_path, name)
    saved(tmp_path, "gpt2")
    saved(tmp_path, "llama", num_attention_heads=3, num_key_value_heads=3, hidden_size=24)
    (tmp_path / "llama").rename(tmp_path / "odd")
    saved(tmp_path, "llama")
    processes(DIVIDED, 2, [str(tmp_path)])
    leader, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name in DIVISIBLE:
        one, tokens = load_hf(tmp_path / name), some_tokens()
        with torch.inference_mode():
            whole = one(tokens)
            assert isinstance(whole, Hidden)
            logits = logits_of(whole.states, whole.lm_head).flatten(0, 1)
        for found in (leader[name], other[name]):
            torch.testing.assert_close(found["states"], whole.states, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found["logits"], logits, atol=1e-5, rtol=1e-4)
            assert found["vocab"] == VOCAB
            assert found["here"] == VOCAB // 2  # it is really divided, the head too
            assert found["notes"] == one.notes
            # which teacher it is does not depend on how many processes it is divided over
            assert found["fingerprint"] == one.fingerprint
    assert "no `tp_plan`" in leader["gpt2"]
    assert "got 2 processes; expected a number that divides the model's 3 attention heads" in leader["odd"]


SHARING = """
import os, torch
from fastkd.teachers.tensor_parallel import join_group
group = join_group(rank, 4, 2, device="cpu")
first = group.share({"from": rank, "array": torch.arange(3)})
if group.worker == 1:
    os._exit(0)  # a worker that dies, without a word
again = group.share([rank])
print(group.worker, group.workers, group.size, group.leader, first["from"], first["array"].tolist(), again, flush=True)
group.leave()  # gloo's threads would else be cut off, and now and then abort
"""


def test_workers_are_apart_and_one_that_dies_holds_up_no_other() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    out = processes(SHARING, 4, [], {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    assert out[0].split("\n")[0] == "0 2 2 True 0 [0, 1, 2] [0]"
    assert out[1].split("\n")[0] == "0 2 2 False 0 [0, 1, 2] [0]"


def test_another_process_that_has_ended_leaves_work() -> None:
    """So status 75 of a command, whose other process was stopped."""
    gone = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:55467.")
    with pytest.raises(WorkRemains, match=r"of 2: another process of the job has ended. Its own"), heeding_others(2):
        raise gone
    with pytest.raises(WorkRemains, match=r"has not answered for 30 minutes"), heeding_others(2):
        raise RuntimeError("Timed out waiting 1800000ms for recv operation to complete")
    for size, error in ((1, gone), (2, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))):
        with pytest.raises(RuntimeError) as caught, heeding_others(size):
            raise error
        assert caught.value is error


@dataclass(frozen=True)
class Follower(ParallelGroup):
    """A process whose leader's call raised an error, after which the same call may succeed `later`."""

    leader: bool = False
    later: bool = False

    def share(self, value: Any) -> Any:
        return LeaderFailed(self.later)


def test_others_end_as_their_leader_does() -> None:
    with pytest.raises(CacheError, match="failed; see its error message"):
        led(Follower(), lambda: None)
    with pytest.raises(WorkRemains, match="stopped; see its message"):
        led(Follower(later=True), lambda: None)
    with pytest.raises(WorkRemains, match="full"):
        led(ParallelGroup(), lambda: (_ for _ in ()).throw(WorkRemains("full")))


def test_one_process_is_a_worker_by_itself() -> None:
    group = join_group(3, 4, 1, device="cpu")
    assert (group.worker, group.workers, group.size, group.leader) == (3, 4, 1, True)
    assert group.share("anything") == "anything"
    group.leave()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("rank", "world", "n"), [(0, 3, 2), (4, 4, 2), (-1, 4, 2), (0, 4, 0)])
def test_numbers_that_do_not_fit(rank: int, world: int, n: int) -> None:
    with pytest.raises(TeacherError, match=f"got n = {n}, rank {rank} of {world}"):
        join_group(rank, world, n, device="cpu")


def test_a_worker_of_one_loads_the_teacher_whole(tmp_path: Path) -> None:
    teacher = load_hf(saved(tmp_path, "llama"), parallel=join_group(0, 1, 1, device="cpu"))
    with torch.inference_mode():
        output = teacher(some_tokens())
    assert isinstance(output, Hidden)
    assert isinstance(output.lm_head, LMHead)
    group = ParallelGroup(0, 1, 1, True, torch.device("cpu"))
    with pytest.raises(TeacherError, match="device: got cuda"):
        load_hf(tmp_path / "llama", parallel=group, device="cuda")


def test_nowhere_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(TeacherError, match=r"MASTER_ADDR"):
        join_group(0, 2, 2, device="cpu")


def test_a_world_of_another_size_is_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with pytest.raises(TeacherError, match=r"a torch.distributed of 1 processes; expected 2"):
            join_group(0, 2, 2, device="cpu")
    finally:
        torch.distributed.destroy_process_group()
