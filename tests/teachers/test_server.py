"""Servers of vLLM and SGLang as teachers: what they answer, what is refused, and what becomes of failures."""

import http.server
import json
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from capture_cases import SMALL, VOCAB, contents, documents
from http_server import http_server
from model_server import FAULTS, ModelServer, array_of, serving

import fastkd
from fastkd.cache import CacheError, open_cache, verify_cache
from fastkd.capture.check import check_teacher
from fastkd.cli.main import main
from fastkd.errors import StreamError, TeacherError, TeacherUnavailable
from fastkd.models.protocol import TopK
from fastkd.settings import ModelSettings
from fastkd.teachers.load import load_teacher
from fastkd.teachers.server.client import ServerClient
from fastkd.teachers.server.options import ServerOptions
from fastkd.teachers.server.teacher import ServerTeacher
from fastkd.train.metrics import read_metrics

pytest.importorskip("httpx2")
pytest.importorskip("msgspec")

SERVED: dict[str, Any] = SMALL | {"draws": 0, "temperatures": (1.0,), "k": 5, "fingerprint": ""}
KINDS = [("vllm", True), ("sglang", True), ("sglang", False)]


def teacher_of(url: str, **options: Any) -> ServerTeacher:
    """With short pauses between tries."""
    chosen = ServerOptions(**{"timeout": 0.25, "retries": 6, "concurrency": 6, **options})
    return ServerTeacher(url, chosen, pause=lambda stop, seconds: stop.wait(seconds / 1000))


def capture(out: Any, url: str, data: Any = None, **changes: Any) -> Any:
    options = {name: changes.pop(name) for name in list(changes) if name in ServerOptions.__dataclass_fields__}
    data = documents() if data is None else data
    return fastkd.capture(teacher_of(url, **options), data, out, **{**SERVED, **changes})


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The contents of a cache that no failure disturbed."""
    out = tmp_path_factory.mktemp("clean")
    with serving(ModelServer()) as url:
        assert capture(out, url).complete
    return contents(out)


# --- what it answers


@pytest.mark.parametrize(("kind", "flat"), KINDS)
def test_its_entries_are_those_of_the_model(kind: str, flat: bool) -> None:
    """Of all positions, the last one included; without the actual token's extra entry."""
    server = ModelServer(kind, flat=flat)
    with serving(server) as url:
        teacher = load_teacher(url, ModelSettings(device="cpu"))
        assert isinstance(teacher, ServerTeacher)
        assert (teacher.vocab_size, teacher.max_positions) == (VOCAB, 62)
        assert teacher.max_k == (20 if kind == "vllm" else VOCAB)
        inputs = torch.tensor([[5, 9, 0, 0], [7, 1, 96, 3]])
        answer = teacher.for_targets(fastkd.settings.CaptureSettings(k=4)).submit(inputs, [2, 4]).result()
        assert isinstance(answer, TopK)
        whole = server.logprobs([7, 1, 96, 3])
    ids, logprobs = array_of(answer)
    best = whole.topk(4)
    np.testing.assert_array_equal(ids[1], best.indices)
    np.testing.assert_allclose(logprobs[1], best.values, atol=1e-6)
    assert np.isinf(logprobs[0, 2:]).all()
    assert np.isfinite(logprobs[0, :2]).all()
    # padding is not sent; a token is added, so that the last position is asked for as the others are
    assert sorted(map(len, server.tokens)) == [3, 5]


@pytest.mark.parametrize(("kind", "flat"), KINDS)
def test_its_cache_is_that_of_the_model(kind: str, flat: bool, tmp_path: Path, clean: dict[int, str]) -> None:
    server = ModelServer(kind, flat=flat)
    with serving(server) as url:
        report = capture(tmp_path / "served", url)
        assert report.complete
        check = check_teacher(open_cache(tmp_path / "served"), teacher_of(url), positions=200, seed=0)
        assert check.ok, check.problems
        fastkd.capture(server.model, documents(), tmp_path / "whole", **SERVED | {"fingerprint": "the model"})
    assert verify_cache(tmp_path / "served", deep=True).ok
    served, whole = (open_cache(tmp_path / name) for name in ("served", "whole"))
    for index in served.shards:
        one, other = ({k: v.copy() for k, v in cache.read_shard(index).items()} for cache in (served, whole))
        for name in ("ids", "outcomes", "tokens"):
            np.testing.assert_array_equal(one[name], other[name])
        for name in ("logprobs", "tail"):
            np.testing.assert_allclose(one[name], other[name], atol=0.08)
    assert 2 <= server.most_at_once <= 7
    if flat:
        assert contents(tmp_path / "served") == clean


def test_what_real_vllm_answers() -> None:
    """Recorded from vLLM 0.32 with SmolLM2-135M-Instruct: the answers to four requests, read as they are."""
    from fastkd.teachers.server import vllm

    recorded = json.loads((Path(__file__).parent / "recorded" / "vllm.json").read_text())
    for name, k in (("completion", 4), ("completion_20", 20)):
        one = recorded[name]
        length = len(one["request"]["prompt"]) - 1
        entries = vllm.parse(json.dumps(one["answer"]).encode(), length, k)
        assert entries.ids.shape == (length, k)
        assert np.isfinite(entries.logprobs).all()
        assert (np.exp(entries.logprobs).sum(1) <= 1 + 1e-5).all()
        for row, said in enumerate(one["answer"]["choices"][0]["prompt_logprobs"][1:]):
            top = {int(token): entry["logprob"] for token, entry in said.items() if entry["rank"] <= k}
            assert dict(zip(entries.ids[row].tolist(), entries.logprobs[row], strict=True)) == pytest.approx(top)
        # the actual token is there with another rank, and is dropped
        assert any(len(said) == k + 1 for said in one["answer"]["choices"][0]["prompt_logprobs"][1:])
    client = Recorded(recorded)
    served = vllm.describe(client, recorded["models"]["data"][0])  # type: ignore[arg-type]
    assert (served.engine, served.vocab_size, served.max_k) == ("vLLM 0.32.0", 49152, 20)
    assert served.max_length == recorded["models"]["data"][0]["max_model_len"]


class Recorded(ServerClient):
    """Answers as it was recorded."""

    def __init__(self, recorded: dict[str, Any]) -> None:
        super().__init__("http://recorded", ServerOptions())
        self.recorded = recorded

    def send(self, path: str, body: bytes | None = None, limit: int = 0) -> Any:
        from fastkd.teachers.server.client import Answered

        if path == "/version":
            return Answered(200, json.dumps(self.recorded["version"]).encode())
        name = "refused_k" if "prompt_logprobs" in json.loads(body or b"{}") else "refused_bias"
        return Answered(self.recorded[name]["status"], json.dumps(self.recorded[name]["answer"]).encode())


def test_the_shape_of_older_sglang_counts_the_first_position() -> None:
    """The flat form as it was first merged; of the schema, not recorded."""
    from fastkd.teachers.server import sglang

    server = ModelServer("sglang")
    body = json.loads(sglang.request(None, [5, 9, 7], 4))  # type: ignore[arg-type]
    _, found = server._sglang(body)
    new = sglang.parse(json.dumps(found).encode(), 2, 4)
    found["meta_info"]["input_top_logprobs_shape"][0] += 1
    old = sglang.parse(json.dumps(found).encode(), 2, 4)
    np.testing.assert_array_equal(old.ids, new.ids)
    np.testing.assert_array_equal(old.logprobs, new.logprobs)


# --- what is refused, before anything is written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draws": 3}, "draws: got 3; expected 0.*Use --draws 0"),
        ({"temperatures": (1.0, 2.0)}, r"temperatures: got 2\.0; expected none but 1\.0.*--temperatures 1"),
    ],
)
def test_targets_that_it_cannot_give_are_refused_before_the_first_request(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    server = ModelServer()
    with serving(server) as url, pytest.raises(TeacherError, match=message):
        capture(tmp_path / "out", url, **changes)
    assert not server.asked
    assert not (tmp_path / "out").exists()
    (tmp_path / "data.jsonl").write_text('{"tokens": [1, 2, 3]}\n')
    words = ["--teacher", url, "--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "out")]
    assert main(["capture", *words, "--device", "cpu"]) == 1  # the defaults have draws
    assert not server.asked


def test_max_logprobs_too_small(tmp_path: Path) -> None:
    with (
        serving(ModelServer()) as url,
        pytest.raises(TeacherError, match=r"k: got 30; expected at most 20.*--max-logp"),
    ):
        capture(tmp_path / "out", url, k=30)
    assert not (tmp_path / "out").exists()


def test_a_server_of_another_model_than_before(tmp_path: Path) -> None:
    server = ModelServer()
    with serving(server) as url:
        assert not capture(tmp_path / "cache", url, stop=fastkd.utils.signals.Stop(asked=True)).complete
        assert capture(tmp_path / "other", url).complete
        # the same name, and another model behind it
        server.model = type(server.model)(seed=1).eval()
        for name in ("cache", "other"):
            with pytest.raises(CacheError, match=r"the server's model is another one.*nats.*Start the server with"):
                capture(tmp_path / name, url)
        # numbers that rounding moves are of the same model
        server.model = type(server.model)().eval()
        with torch.no_grad():
            server.model.head.mul_(1.0005)
        assert capture(tmp_path / "cache", url).complete
        # another name
        server.model, server.name = type(server.model)().eval(), "toy-2"
        with pytest.raises(CacheError, match=r"teacher: 'toy, served by vLLM 0\.32\.0.* and 'toy-2, served by"):
            capture(tmp_path / "cache", url)
        with pytest.raises(TeacherError, match=r"a server of toy-2; expected toy\. Start it with that model"):
            capture(tmp_path / "cache", url, model="toy")


def test_a_tokenizer_that_differs(tmp_path: Path) -> None:
    from hf_cases import tokenizer_of

    from fastkd.models.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_of())
    server = ModelServer(ids=tokenizer.encode_chat)
    texts = [{"text": "the quick fox"}, {"text": "the dog"}]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, texts)))
    with serving(server) as url:
        teacher_of(url).check_tokenizer(tokenizer)
        server.ids = lambda text: [*tokenizer.encode_chat(text)[:-1], 7]
        with pytest.raises(TeacherError, match=r"tokenizer: got .*from the \d+\. on; expected those of the server's"):
            capture(tmp_path / "out", url, data, tokenizer=tokenizer)
        # of a server that does not say, a person is told
        server.hidden = {"/tokenize"}
        teacher = teacher_of(url)
        teacher.check_tokenizer(tokenizer)
        assert "its tokenizer was not compared" in teacher.notes[0]
        # without one, text is not for it
        with pytest.raises(fastkd.errors.DataError, match="tokenizer"):
            capture(tmp_path / "out", url, data)
    assert not (tmp_path / "out").exists()


def test_fewer_positions_than_asked(tmp_path: Path) -> None:
    server = ModelServer(fault=lambda number, tokens: "count")
    with (
        serving(server) as url,
        pytest.raises(TeacherUnavailable, match="log-probabilities of 24 positions; expected 25"),
    ):
        capture(tmp_path / "out", url, retries=1)
    assert not list(tmp_path.rglob("shards/*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "tgi"}, "a server of tgi; expected vLLM or SGLang"),
        ({"max_length": 12}, r"got 16 tokens; expected at most 10, as the server takes 12"),
    ],
)
def test_other_servers(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with serving(ModelServer(**change)) as url, pytest.raises(TeacherError, match=message):
        teacher_of(url).submit(torch.zeros(1, 16, dtype=torch.int64), [16])


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(TeacherError, match=r"cannot be reached \(ConnectError.*Start it, and check host and port"):
        _ = teacher_of(url).vocab_size


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, b"<html>Welcome</html>", {}), r"/v1/models answered with '<html>Welcome.*expected a list of models"),
        ((200, b'{"data": 3}', {}), "expected a list of models"),
        ((404, b"not here", {}), r"404 \(not here\)\. Is it the address of a server of vLLM"),
        (
            (307, b"", {"Location": "http://a:canary@there/x?canary"}),
            r"on to http://…@there/x\?… \(status 307\).*Use the",
        ),
    ],
)
def test_something_else_at_the_address(answer: tuple[int, bytes, dict[str, str]], message: str) -> None:
    """Said at once: it is not asked again."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(answer[0])
            for name, value in answer[2].items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer[1])

        def log_message(self, *text: Any) -> None:
            """No log."""

    with http_server(Handler) as url, pytest.raises(TeacherError, match=message) as error:
        _ = teacher_of(url).vocab_size
    assert "canary" not in str(error.value)
    assert not isinstance(error.value, TeacherUnavailable)
    assert asked == ["/v1/models"]


def test_a_certificate_that_is_not_trusted(monkeypatch: Any) -> None:
    teacher = teacher_of("https://host:1")
    error = teacher.client._httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate")
    monkeypatch.setattr(teacher.client, "_http", Mock(stream=Mock(side_effect=error)))
    with pytest.raises(TeacherError, match=r"is not trusted \(.*Set the environment variable SSL_CERT_FILE"):
        _ = teacher.vocab_size


def test_a_context_that_is_too_long_and_features_leave_nothing_behind(tmp_path: Path) -> None:
    with serving(ModelServer()) as url:
        for changes, message in (
            ({"context": 63}, "context: got 63; expected at most 62"),
            ({"features": ("-1",)}, "lay"),
        ):
            with pytest.raises(TeacherError, match=message):
                capture(tmp_path / "out", url, **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_server_that_comes_back_with_another_model(tmp_path: Path, seed: int, clean: dict[int, str]) -> None:
    """In the middle of a capture. Nothing of the other model is kept."""
    server = ModelServer()
    with serving(server) as url:
        teacher = teacher_of(url)

        def fault(number: int, tokens: list[int]) -> str:
            if number == 12:
                server.model = type(server.model)(seed=seed).eval()
                teacher.client.absences += 1  # as if it had not been there
            return ""

        server.fault = fault
        if seed == 0:  # the same one
            assert fastkd.capture(teacher, documents(), tmp_path / "out", **SERVED).complete
        else:
            with pytest.raises(TeacherError, match=r"came back with another model: .*nats.*Start it with the model"):
                fastkd.capture(teacher, documents(), tmp_path / "out", **SERVED)
            server.model, server.fault = type(server.model)().eval(), lambda number, tokens: ""
            assert capture(tmp_path / "out", url).complete
    assert contents(tmp_path / "out") == clean


def test_absences_are_counted() -> None:
    with serving(ModelServer()) as url:
        teacher = teacher_of(url, retries=1)
        assert teacher.vocab_size == VOCAB
    teacher.client._http.close()
    teacher = teacher_of(url, retries=1)
    teacher.client._reached = True  # it had answered
    with pytest.raises(TeacherUnavailable, match="failed 2 times"):
        teacher.client.ask("/version", bytes)
    assert teacher.client.absences == 2


def test_settings_that_a_server_does_not_have() -> None:
    with pytest.raises(TeacherError, match="dtype: got 'bfloat16' for a server; expected the default"):
        load_teacher("http://host:1", ModelSettings(device="cpu", dtype="bfloat16"))
    with pytest.raises(TeacherError, match=r"got conc; expected NAME=VALUE of a server, with a NAME among model, api"):
        load_teacher("http://host:1", ModelSettings(device="cpu", teacher_options=("conc=3",)))
    with pytest.raises(TeacherError, match="concurrency: got another type of value; expected int"):
        load_teacher("http://host:1", ModelSettings(device="cpu", teacher_options=("concurrency=x",)))
    with pytest.raises(TeacherError, match="only vllm:NAME and http://HOST:PORT have options"):
        load_teacher("a-model", ModelSettings(device="cpu", teacher_options=("model=x",)))


# --- credentials


def test_the_token_is_sent_and_shown_nowhere(tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    server = ModelServer(token="canary-of-the-token")
    monkeypatch.setenv("TOY", "canary-of-the-token")
    (tmp_path / "data.jsonl").write_text('{"tokens": [1, 2, 3]}\n{"tokens": [3, 2, 1]}\n')
    with serving(server) as url:
        words = ["--data", str(tmp_path / "data.jsonl"), "--draws", "0", "--temperatures", "1", "--device", "cpu"]
        words += ["--k", "4", "--held-out", "0", "--out", str(tmp_path / "out"), "--teacher", url]
        assert main(["capture", *words]) == 1
        assert "expected a token" in capfd.readouterr().err
        assert main(["capture", *words, "--teacher-options", "token_env=canary-of-the-token"]) == 1
        assert main(["capture", *words, "--json", "--teacher-options", "token_env=TOY"]) == 0
        server.token = "another"
        assert main(["capture", *words, "--teacher-options", "token_env=TOY"]) == 1
    shown = capfd.readouterr()
    assert "expected another token" in shown.err
    assert "canary" not in shown.out + shown.err
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"canary" not in path.read_bytes()


# --- failures


def failing(seed: int, share: float) -> Any:
    """Each request after the first (the probe) fails with some probability, in a random way."""
    chance, lock = random.Random(seed), threading.Lock()

    def fault(number: int, tokens: list[int]) -> str:
        with lock:
            return chance.choice(FAULTS) if number and chance.random() < share else ""

    return fault


def survive(out: Path, clean: dict[int, str], kind: str, failures: int, seed: int = 0) -> int:
    """Capture while requests fail, again and again until that many have; the number of failures. Nothing is lost, and
    each failure is counted."""
    made = 0
    for run in range(1000):
        server = ModelServer(kind, fault=failing(seed + run, 0.4))
        with serving(server) as url:
            teacher = teacher_of(url, retries=30)
            report = fastkd.capture(teacher, documents(), out / str(run), **SERVED)
            assert report.complete
            assert contents(out / str(run)) == clean
            hurt = sum(count for name, count in server.faults.items() if name != "slow")
            assert teacher.client.figures["retries"] >= hurt  # more on a busy machine, where an answer may come late
            assert f"{teacher.client.figures['retries']:,.0f} of them repeated" in teacher.summary()
            assert teacher.client.in_flight == [0, 0]
        made += sum(server.faults.values())
        if made >= failures:
            return made
    raise AssertionError


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_failures_lose_nothing(kind: str, tmp_path: Path, clean: dict[int, str]) -> None:
    assert survive(tmp_path, clean, kind, 40) >= 40


@pytest.mark.soak
def test_five_hundred_failures_lose_nothing(tmp_path: Path, clean: dict[int, str]) -> None:
    made = sum(survive(tmp_path / kind, clean, kind, 250, seed=100) for kind in ("vllm", "sglang"))
    assert made >= 500


def test_a_request_that_keeps_failing_ends_its_shard(tmp_path: Path, clean: dict[int, str], capfd: Any) -> None:
    """The others are captured; the next run does what is missing."""
    bad = documents()[4][:5]
    server = ModelServer(fault=lambda number, tokens: "500" if tokens[:5] == bad else "")
    with serving(server) as url:
        report = capture(tmp_path, url, retries=2, progress="lines")
        assert (report.complete, report.status, len(report.failed)) == (False, 75, 1)
        (why,) = report.failed.values()
        assert "document 4" in why
        assert "failed 3 times, the last time with status 500 (overloaded)" in why
        there = contents_of_shards(tmp_path)
        assert len(there) == len(clean) - 1
        assert "is left to a later run" in capfd.readouterr().err
        server.fault = lambda number, tokens: ""
        report = capture(tmp_path, url)
        assert (report.complete, report.shards_written) == (True, 1)
    assert contents(tmp_path) == clean


def contents_of_shards(folder: Path) -> list[int]:
    return list(open_cache(folder).shards)


def test_a_server_that_goes_away_ends_the_run(tmp_path: Path, clean: dict[int, str]) -> None:
    server = ModelServer()
    gone = threading.Event()

    def fault(number: int, tokens: list[int]) -> str:
        if number >= 12:
            gone.set()
        return "reset" if gone.is_set() else ""

    server.fault = fault
    with serving(server) as url:
        report = capture(tmp_path, url, retries=2)
        assert report.status == 75
        assert len(report.failed) == 3
    server = ModelServer()
    with serving(server) as url:
        assert capture(tmp_path, url).complete
    assert contents(tmp_path) == clean


def test_a_stop_does_not_wait_for_the_server(tmp_path: Path) -> None:
    stop = fastkd.utils.signals.Stop()

    def fault(number: int, tokens: list[int]) -> str:
        if number == 3:
            stop()
        return "500" if number >= 3 else ""

    with serving(ModelServer(fault=fault)) as url:
        teacher = ServerTeacher(url, ServerOptions(retries=30, concurrency=2))  # whose pauses last for minutes
        report = fastkd.capture(teacher, documents(), tmp_path, stop=stop, **SERVED)
    assert report.status == 75
    assert not report.failed


@pytest.fixture(autouse=True)
def _no_threads_are_left() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name == "server-request":
            thread.join(5)
            assert not thread.is_alive()


def test_live(tmp_path: Path) -> None:
    """A student beside a server learns what it learns from the server's cache, but for the codec."""
    from train_cases import Tiny

    student = Tiny(vocab=VOCAB, seed=1)
    live = fastkd.settings.LiveSettings(
        k=5, draws=0, temperatures=(1.0,), context=16, held_out=0.2, shard_positions=64, teacher_batch_tokens=40
    )
    how: dict[str, Any] = {"steps": 2, "batch_tokens": 60, "device": "cpu", "alpha": 0.3}
    with serving(ModelServer()) as url:
        report = fastkd.train(student, None, tmp_path / "run", teacher=url, data=documents(), live=live, **how)
        assert report.complete
        with pytest.raises(TeacherError, match="draws: got 16; expected 0"):
            fastkd.train(student, None, tmp_path / "other", teacher=url, data=documents(), **how)
        assert not (tmp_path / "other").exists()


def test_a_live_run_resumes(tmp_path: Path) -> None:
    """Beside the same model, also at another address: the bytes of a run that nobody stopped. Another model is refused,
    and a server that is away leaves the run as its last checkpoint has it."""
    from train_cases import Tiny, bits, stopped

    live = fastkd.settings.LiveSettings(
        k=5, draws=0, temperatures=(1.0,), context=16, held_out=0.2, shard_positions=64, teacher_batch_tokens=40
    )
    how: dict[str, Any] = {"steps": 3, "batch_tokens": 60, "device": "cpu", "alpha": 0.3, "checkpoint_every": 1}
    how |= {"keep": 9, "evaluate_every": 2, "data": documents(), "live": live}

    def train(name: str, url: str, **changes: Any) -> Any:
        return fastkd.train(
            Tiny(vocab=VOCAB, seed=1), None, tmp_path / name, teacher=teacher_of(url, retries=1), **how | changes
        )

    with serving(ModelServer()) as url:
        assert train("whole", url).complete
        assert not train("parts", url, stop=stopped()).complete
    away = ModelServer(fault=lambda number, tokens: "503")
    with serving(away) as url, pytest.raises(TeacherUnavailable, match="failed 2 times, the last time with status 503"):
        train("parts", url)
    other = r"of a loader with other settings: teacher: '.*toy-1.*' there, '.*toy-2.*' here"
    with serving(ModelServer(root="/models/toy-2")) as url, pytest.raises(StreamError, match=other):
        train("parts", url)
    with serving(ModelServer()) as url:
        report = train("parts", url)
        assert (report.complete, report.resumed) == (True, 1)
    for step in (1, 2, 3):
        assert bits(tmp_path / "parts", step) == bits(tmp_path / "whole", step)
    assert read_metrics(tmp_path / "parts")[-1]["step"] == 3
