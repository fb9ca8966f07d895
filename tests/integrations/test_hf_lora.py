"""A model with an adapter in DistillTrainer: nothing is said of the adapter, and nothing is lost."""

import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import train_jobs
from hf_trainer_cases import FSDP, by_hand, losses, student, trainer
from lora_cases import ATTENTION, adapted
from train_cases import make_cache

from fastkd.cache import Cache
from fastkd.errors import TrainError
from fastkd.integrations.hf import attach
from fastkd.models.hub import load_transformers

pytestmark = pytest.mark.usefixtures("one_thread")
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("adapter") / "cache")


def lora(**changes: Any) -> Any:
    return adapted(base=student(torch.float32), **changes)


def trained_of(model: Any) -> dict[str, torch.Tensor]:
    return {name.removeprefix(PREFIX): p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_weights_are_those_of_a_loop(cache: Cache, tmp_path: Path) -> None:
    """The loop calls the model inside the PeftModel; the base stays as it is."""
    model = lora()
    theirs, state = by_hand(cache, model.get_base_model())
    made = trainer(cache, tmp_path, lora(), accumulation=2)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters() if not p.requires_grad}
    made.train()
    assert losses(made) == pytest.approx(theirs, abs=1e-6)
    for name, tensor in trained_of(made.model).items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=1e-6, msg=name)
    assert all(torch.equal(p, before[name]) for name, p in made.model.named_parameters() if name in before)


def test_what_is_saved_is_an_adapter_folder(cache: Cache, tmp_path: Path) -> None:
    """By the Trainer, at checkpoints and at the end; a resume is exact."""
    import peft

    base = student(torch.float32)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    given: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5, "accumulation": 2}
    made = trainer(cache, tmp_path / "run", adapted(base=base, trained=False, lora_dropout=0.3), **given)
    made.train()
    made.save_model()
    folder = tmp_path / "run"
    assert not (folder / "model.safetensors").exists()
    assert (folder / "checkpoint-5" / "adapter_model.safetensors").exists()
    # PEFT saves an empty template as the card; ours takes its place, and what a person wrote stays
    made.create_model_card()
    card = (folder / "README.md").read_text()
    assert cache.spec.hash in card
    made.save_model()
    assert (folder / "README.md").read_text() == card
    (folder / "README.md").write_text("mine")
    made.save_model()
    made.create_model_card()
    assert (folder / "README.md").read_text() == "mine"
    tokens = torch.arange(9)[None]
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = made.model.eval()(input_ids=tokens).logits
        assert torch.equal(loaded(input_ids=tokens).logits, wanted)
    shutil.copytree(folder / "checkpoint-10", tmp_path / "again" / "checkpoint-10")
    other = load_transformers().AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = trainer(cache, tmp_path / "again", adapted(base=other, trained=False, lora_dropout=0.3), **given)
    again.train(resume_from_checkpoint=True)
    for name, tensor in trained_of(again.model).items():
        assert torch.equal(tensor, trained_of(made.model)[name]), name


@pytest.mark.parametrize("changes", [{"target_modules": [*ATTENTION, "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_adapters_on_the_head(cache: Cache, tmp_path: Path, changes: dict[str, Any]) -> None:
    made = trainer(cache, tmp_path, lora(**changes), max_steps=4)
    before = {name: t.clone() for name, t in trained_of(made.model).items()}
    made.train()
    assert losses(made)[-1] < losses(made)[0]
    assert all(not torch.equal(t, before[name]) for name, t in trained_of(made.model).items())


def test_refused() -> None:
    import peft

    prefix = peft.get_peft_model(student(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(TrainError, match=r"attach: .* the kind PREFIX_TUNING, which puts virtual tokens"):
        attach(prefix)
    with pytest.raises(TrainError, match="LM head is not found as one matrix"):
        attach(lora(target_modules=["lm_head"], use_dora=True))


def train(cache: Path, out: Path, runs: dict[str, dict[str, Any]]) -> None:
    """In a process of several; the first one writes losses and what was trained to OUT/NAME.pt."""
    import warnings

    warnings.simplefilter("ignore")
    for name, changes in runs.items():
        made = trainer(cache, out / name, lora(), **changes)
        made.train()
        state = made.accelerator.get_state_dict(made.model)
        if made.is_world_process_zero():
            torch.save([losses(made), {n: t for n, t in state.items() if "lora_" in n}], out / f"{name}.pt")
        made.accelerator.free_memory()
    torch.distributed.destroy_process_group()


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes(cache: Cache, tmp_path: Path, kind: str) -> None:
    changes = FSDP if kind == "fsdp" else {}
    runs = {kind: changes, f"{kind}-2": {**changes, "accumulation": 2}}
    train_jobs.run(train, cache.store.describe(), tmp_path, runs, ranks=2)
    theirs, state = by_hand(cache, lora().get_base_model())
    for name in (kind, f"{kind}-2"):
        found, trained = torch.load(tmp_path / f"{name}.pt")
        assert found == pytest.approx(theirs, abs=2e-6)
        assert trained
        for path, tensor in trained.items():
            torch.testing.assert_close(tensor, state[path.removeprefix(PREFIX)], rtol=0, atol=2e-6, msg=path)


def test_the_example(tmp_path: Path) -> None:
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "lora.py"))
    torch.manual_seed(0)
    before, after = example["main"](
        *example["toy"](str(tmp_path)), str(tmp_path / "run"), use_cpu=True, disable_tqdm=True, log_level="error"
    )
    assert after < before
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
