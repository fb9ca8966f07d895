"""A divergence is one file: docs/extending.md, walked through; and what an incomplete file says."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import KINDS, case
from test_matrix import DEVICE_ON, IMPLS_ON_CPU, agree, run

from fastkd import DistillationLoss, KDError, LossConfig, kd_loss, linear_kd_loss
from fastkd.kernels import divergences, resolve_treatment
from fastkd.kernels.loss.config import PARAMETERS

FILE = Path(__file__).parent / "added_divergences" / "alpha_divergence.py"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose files count as files of kernels/divergences."""
    monkeypatch.setattr(divergences, "__path__", [*divergences.__path__, str(tmp_path)])
    before = dict(divergences._known)
    yield tmp_path
    for name in divergences._known.keys() - before.keys():
        sys.modules.pop(f"{divergences.__name__}.{name}", None)
    divergences._known.clear()
    divergences._known.update(before)


@pytest.fixture
def added(folder: Path) -> None:
    """A sixth divergence: one file, and nothing else."""
    (folder / FILE.name).write_text(FILE.read_text())
    divergences.load_folder()


@pytest.mark.usefixtures("added")
@DEVICE_ON
@pytest.mark.parametrize("kind", KINDS)
def test_an_added_file_is_a_divergence(kind: str, on) -> None:
    """By its file name, with its parameter or the default: every implementation agrees with the oracle."""
    assert "alpha_divergence" in divergences.divergence_names()
    for seed, (t, parameter, inplace) in enumerate([(1.0, None, False), (2.0, 0.2, True), (3.3, 0.7, False)]):
        c = case(kind, 5, 100, 7, 6, seed=seed)
        settings = {"divergence": "alpha_divergence", "divergence_parameter": parameter, "temperature": t, "alpha": 0.3}
        # the oracle by the public function; its formula is held against the definition below
        expected = run(c, ("reference", "cpu"), **settings)
        agree(c, run(c, on, inplace=inplace, **settings), expected, 1.0, t)


@pytest.mark.usefixtures("added")
@IMPLS_ON_CPU
@pytest.mark.parametrize("a", [None, 0.2])
def test_an_added_divergence_is_its_definition(a: float | None, impl: str) -> None:
    c = case("plain", 6, 40, 5)
    z, hidden = c.logits.double().requires_grad_(), c.logits.clone().requires_grad_()
    at, order = c.targets.at(2.0, "bucket", dtype=torch.float64), 0.5 if a is None else a
    p = (z / 2.0).softmax(1)
    on = torch.zeros_like(p).scatter(1, c.targets.ids[:, :5].long(), 1.0)
    p = torch.cat([p.gather(1, c.targets.ids[:, :5].long()), (p * (1 - on)).sum(1, keepdim=True)], 1)
    q = torch.cat([at.log_q[:, :5].exp(), at.log_q_tail.exp()[:, None]], 1)
    expected = 4.0 * ((1 - (q**order * p ** (1 - order)).sum(1)) / (order * (1 - order))).mean()
    expected.backward()
    config = LossConfig(temperature=2.0, divergence="alpha_divergence", divergence_parameter=a, impl=impl)
    loss = linear_kd_loss(hidden, torch.eye(40), c.targets, None, config=config).loss
    loss.backward()
    assert abs(float(loss.detach()) - float(expected.detach())) < 1e-5
    assert (hidden.grad - z.grad).abs().max() < 1e-6


@pytest.mark.usefixtures("added")
def test_the_parameter_of_an_added_divergence() -> None:
    assert LossConfig(divergence="alpha_divergence", alpha=0.3).parameter == 0.5
    assert LossConfig(divergence="alpha_divergence", divergence_parameter=0.2).parameter == 0.2
    for settings, says in (
        ({"divergence": "alpha_divergence", "divergence_parameter": 1.0}, "divergence_parameter: got 1.0; expected"),
        ({"divergence": "jsd", "divergence_parameter": 0.2}, "divergence 'jsd'; expected it as beta"),
        ({"divergence": "tvd", "divergence_parameter": 0.2}, "divergence 'tvd'; expected no parameter"),
        ({"divergence": "alpha_divergence", "treatment": "sampled"}, "treatment: got 'sampled' with"),
    ):
        with pytest.raises(KDError, match=says):
            LossConfig(**settings)


def without(name: str) -> str:
    """The file without one of its functions or constants."""
    return re.sub(rf"(?ms)^(def {name}\(|{name} = ).*?(?=^\w|\Z)", "", FILE.read_text())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        *((without(n), f"got no {n}; expected") for n in ("PARAMETER", "TREATMENTS", "torch_terms", "triton_terms")),
        (without("oracle_terms"), "got no oracle_terms; expected"),
        (FILE.read_text() + "\ntorch_terms = None\n", "torch_terms: got None; expected a function"),
        (FILE.read_text() + "\nPARAMETER = 0.5\n", "PARAMETER: got 0.5; expected"),
        (FILE.read_text() + "\nTREATMENTS = 'bucket'\n", "TREATMENTS: got 'bucket'; expected a tuple"),
        (FILE.read_text() + "\nimport no_such_module\n", "importing it raised ModuleNotFoundError"),
    ],
)
def test_an_incomplete_divergence_is_refused_when_it_is_named(text: str, says: str, folder: Path) -> None:
    """On every path, and before anything is computed; the others work as before."""
    (folder / "half.py").write_text(text)
    divergences.load_folder()
    c = case("plain", 4, 40, 5)
    hidden, weight = torch.randn(4, 3), torch.randn(40, 3)
    says = f"divergence: got 'half', whose definition is not complete: {says}"
    for impl in ("auto", "torch", "triton", "reference"):
        for call in (
            lambda impl=impl: LossConfig(divergence="half", impl=impl),
            lambda impl=impl: DistillationLoss(divergence="half", impl=impl),
            lambda impl=impl: kd_loss(c.logits, c.targets, c.labels, divergence="half", impl=impl),
            lambda impl=impl: linear_kd_loss(hidden, weight, c.targets, c.labels, divergence="half", impl=impl),
            lambda: resolve_treatment("auto", 1.0, has_draws=True, divergence="half"),
        ):
            with pytest.raises(KDError, match=says):
                call()
    assert kd_loss(c.logits, c.targets, c.labels, divergence="tvd").loss.isfinite()


def test_a_divergence_from_outside_the_package(folder: Path) -> None:
    text = FILE.read_text().replace("from . import", "from fastkd.kernels.divergences import")
    names: dict[str, object] = {"__name__": "theirs"}
    exec(compile(text, str(FILE), "exec"), names)
    divergences.register_divergence("theirs", SimpleNamespace(**names))
    c = case("plain", 4, 40, 5)
    found = [kd_loss(c.logits, c.targets, c.labels, divergence="theirs", impl=i).loss for i in ("torch", "reference")]
    assert torch.allclose(*found)
    with pytest.raises(KDError, match="'mine', whose definition is not complete: got no torch_terms"):
        divergences.register_divergence("mine", SimpleNamespace(PARAMETER=None, TREATMENTS=("bucket",)))
    assert "mine" not in divergences.divergence_names()


def test_names_come_from_the_folder_and_cost_nothing() -> None:
    """For the command line: without torch and triton, and as a Literal."""
    code = """
import sys
sys.modules["torch"] = sys.modules["triton"] = None
from typing import get_args
from fastkd.kernels import LossConfig, resolve_treatment
from fastkd.kernels.divergences import DivergenceName, divergence_names
assert get_args(DivergenceName) == divergence_names()
assert resolve_treatment("auto", 1.0, has_draws=True) == "sampled"
LossConfig(temperature=2.0, divergence="jsd")
print(*divergence_names())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    files = {f.stem for f in Path(divergences.__file__).parent.glob("*.py") if not f.stem.startswith("_")}
    assert set(result.stdout.split()) == files == {"forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd"}


def test_own_fields_have_the_divergences_defaults() -> None:
    defaults = {p.name: p.default for p in divergences.divergence_parameters()}
    assert defaults == {name: getattr(LossConfig(), name) for name in PARAMETERS}
