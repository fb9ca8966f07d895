"""The examples of Hugging Face's trainers, as a person runs them."""

import re
import runpy
import warnings
from pathlib import Path

import pytest
import torch
from hf_cases import tokenizer_of

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLES = Path(__file__).parents[2] / "examples"
QUIET = {"use_cpu": True, "disable_tqdm": True, "log_level": "error"}


def test_trainers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    trainer, sft = (runpy.run_path(str(EXAMPLES / name)) for name in ("hf_trainer.py", "hf_sft_trainer.py"))
    torch.manual_seed(0)
    student, cache = trainer["toy"](str(tmp_path))
    student.save_pretrained(tmp_path / "student")
    found = trainer["main"](student, cache, str(tmp_path / "run"), **QUIET)
    assert found["eval_kl"] > 0
    assert (tmp_path / "run" / "model.safetensors").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's own, of transformers' names
        tokenizer = tokenizer_of()
        log = sft["main"](str(tmp_path / "student"), cache, str(tmp_path / "sft"), processing_class=tokenizer,
                           bf16=False, **QUIET)  # fmt: skip
    assert log[0]["loss"] == pytest.approx(0.3 * log[0]["hard"] + 0.7 * log[0]["soft"], rel=1e-5)
    assert re.search(r"^\d\.\d+ nats from the teacher on held-out", capsys.readouterr().out, re.MULTILINE)
    assert (tmp_path / "sft" / "config.json").exists()
