"""DistillTrainer as people use a Trainer: callbacks, the best model, the Hub, TRL; and what it refuses."""

import copy
import inspect
import json
import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import train_jobs
from hf_cases import saved, tokenizer_of
from hf_trainer_cases import SIZE, USUAL, arguments, losses, refused_stock, stock, student, trainer, weights
from train_cases import make_cache

import fastkd
from fastkd.cache import Cache
from fastkd.errors import StreamError, TrainError
from fastkd.evaluate.api import evaluate
from fastkd.integrations.hf import DistillMixin, DistillTrainer, attach, detach
from fastkd.integrations.hf.checks import check_processes
from fastkd.integrations.hf.evaluation import less_is_better
from fastkd.models.hub import load_transformers
from fastkd.stream.split import open_split
from fastkd.train.student import of_transformers

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("use") / "cache")


def test_evaluate(cache: Cache, tmp_path: Path) -> None:
    """Before a training, the measures of fastkd.evaluate."""
    made = trainer(cache, tmp_path)
    found = made.evaluate(metric_key_prefix="test")
    measured = evaluate(of_transformers(student(), "student"), cache).summary()
    for name in ("cross_entropy", "kl_bucket", "kl_sampled", "agreement", "accuracy", "perplexity"):
        assert found[f"test_{name}"] == pytest.approx(measured[name]["mean"], rel=1e-6)
    assert found["test_loss"] == found["test_cross_entropy"]
    assert found["test_kl"] == found["test_kl_sampled"]
    assert len(made.eval_dataset) == open_split(cache, "held_out").sequences.sum()
    refused("evaluate_positions: got 1, which leaves nothing", cache, tmp_path, loss={"evaluate_positions": 1})


def test_the_best_model_callbacks_and_early_stopping(cache: Cache, tmp_path: Path) -> None:
    transformers = load_transformers()
    seen: list[str] = []

    class Seen(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **more: Any) -> None:
            seen.append(f"evaluate {state.global_step} {metrics['eval_kl'] > 0}")

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            seen.append(f"step {state.global_step}")

    stopping = transformers.EarlyStoppingCallback(early_stopping_patience=2)
    # a rate at which it gets worse after some steps
    made = trainer(
        cache, tmp_path, callbacks=[Seen(), stopping], eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, save_total_limit=2, load_best_model_at_end=True, metric_for_best_model="cross_entropy",
        learning_rate=0.1, num_train_epochs=3, lr_scheduler_type="constant",
    )  # fmt: skip
    made.train()
    measured = [line["eval_cross_entropy"] for line in made.state.log_history if "eval_loss" in line]
    best = measured.index(min(measured)) + 1
    assert made.state.best_global_step == best
    assert made.state.global_step == len(measured) == best + 2
    assert made.evaluate()["eval_cross_entropy"] == pytest.approx(min(measured), rel=1e-6)
    assert seen[:3] == ["step 1", "evaluate 1 True", "step 2"]
    loaded = load_transformers().AutoModelForCausalLM.from_pretrained(made.state.best_model_checkpoint)
    assert all(torch.equal(a, made.model.state_dict()[n]) for n, a in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("name", "greater"),
    [("kl", False), ("eval_kl", False), ("eval_ece", False), ("perplexity", False), ("agreement", True), (None, None)],
)
def test_which_way_a_measure_is_better(name: str | None, greater: bool | None) -> None:
    """transformers takes every measure for better the higher it is, unless its name ends in "loss"."""
    from transformers import TrainingArguments

    args = TrainingArguments("unused", use_cpu=True, metric_for_best_model=name)
    less_is_better(args)
    assert args.greater_is_better is greater


def test_a_model_that_was_attached_before(cache: Cache, tmp_path: Path) -> None:
    """By another trainer, of another loss: the new trainer's counts. By its user: that one, unless there is another."""
    other = {"alpha": 0.0, "divergence": "reverse_kl"}
    plain = trainer(cache, tmp_path, loss=other, max_steps=1)
    plain.train()
    model = student()
    trainer(cache, tmp_path, model)  # not trained
    again = trainer(cache, tmp_path, model, loss=other, max_steps=1)
    again.train()
    ours = trainer(cache, tmp_path, attach(student(), **other), loss={}, max_steps=1)
    ours.train()
    assert losses(again) == losses(ours) == losses(plain)


def test_a_trainer_of_ones_own(cache: Cache, tmp_path: Path) -> None:
    """Whose steps are those of the dataset: the weights of a DistillTrainer, also of the last step of an epoch."""
    ours = trainer(cache, tmp_path / "ours", num_train_epochs=1)
    ours.train()
    state = weights(ours.model)
    for accumulation in (1, 2, 4):
        made = stock(cache, tmp_path / "stock", accumulation, accumulation=accumulation, num_train_epochs=1)
        made.train()
        assert made.state.global_step == ours.state.global_step
        for name, tensor in weights(made.model).items():
            torch.testing.assert_close(tensor, state[name], rtol=0, atol=1e-9)


def test_a_trainer_whose_steps_are_others(cache: Cache, tmp_path: Path) -> None:
    """Their gradient would be scaled; and so would the loss of an evaluation on a part of a step."""
    for micro_batches, accumulation in ((1, 2), (2, 1), (4, 2)):
        made = stock(cache, tmp_path, micro_batches, accumulation=accumulation)
        with pytest.raises(TrainError, match=r"a step of \d+ positions in a Trainer's step of \d+; expected the same"):
            made.train()
        assert made.state.global_step == 0
    whole, divided = stock(cache, tmp_path, 1), stock(cache, tmp_path, 2)
    assert whole.evaluate(whole.train_dataset)["eval_loss"] > 0
    with pytest.raises(TrainError, match="with 1 for an eval_dataset"):
        divided.evaluate(divided.train_dataset)


@pytest.mark.soak
def test_a_trainer_of_ones_own_on_two_processes(cache: Cache, tmp_path: Path) -> None:
    """It gives each process another step, so that half of all shares would never be read."""
    train_jobs.run(refused_stock, cache.store.describe(), tmp_path, ranks=2)
    for rank in "01":
        why = (tmp_path / rank).read_text()
        assert why.startswith(f"step 0: DistillDataset: got micro-batch 0 of step {2 + int(rank)} after ({rank}, 0)")
        assert why.endswith("or DistillMixin in a Trainer.")


def test_a_trainer_of_ones_own_and_an_adapter(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a model whose forward has no **kwargs: a Trainer would divide its loss by the accumulation."""
    import peft

    def of(base: Any) -> Any:
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
        torch.manual_seed(0)
        return peft.get_peft_model(base, config)

    base = student()
    kind = type(base)

    def forward(self: Any, input_ids: Any = None, position_ids: Any = None, labels: Any = None, use_cache: Any = None,
                logits_to_keep: Any = 0, **more: Any) -> Any:  # fmt: skip
        return kind.forward(self, input_ids, position_ids=position_ids, logits_to_keep=logits_to_keep, **more)

    names = ("self", "input_ids", "position_ids", "labels", "use_cache", "logits_to_keep")
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kinds) for name in names])  # type: ignore[attr-defined]
    base.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    found = []
    for accumulation in (1, 2):
        made = stock(cache, tmp_path, accumulation, of(copy.deepcopy(base)), accumulation=accumulation, max_steps=2)
        made.train()
        found.append(losses(made))
        assert "accepts_loss_kwargs" not in vars(detach(made.model).get_base_model())
    assert found[1] == pytest.approx(found[0], rel=1e-9)


def test_attached_again_after_bfloat16(cache: Cache, tmp_path: Path) -> None:
    """accelerate leaves a forward with autocast on the model."""
    made = trainer(cache, tmp_path, student(torch.float32), bf16=True, max_steps=1)
    made.train()
    made.evaluate()
    model = detach(made.model)
    assert not {"forward", "_original_forward", "_kd"} & vars(model).keys()
    tokens = torch.tensor([[1, 2, 3]])
    fresh = student(torch.float32)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(input_ids=tokens).logits, fresh(input_ids=tokens).logits)
    again, theirs = (trainer(cache, tmp_path, attach(one), loss={}, max_steps=2) for one in (model, fresh))
    again.train()
    theirs.train()
    assert losses(again) == losses(theirs)


@pytest.mark.parametrize("name", ["bf16_full_eval", "fp16_full_eval"])
def test_full_eval(cache: Cache, tmp_path: Path, name: str) -> None:
    """The measures of the model in that type, which the evaluation then leaves as it was."""
    made = trainer(cache, tmp_path, student(torch.float32), **{name: True})
    before = weights(made.model)
    found = made.evaluate()
    dtype = getattr(torch, name[:2].replace("bf", "bfloat16").replace("fp", "float16"))
    half = trainer(cache, tmp_path, student(torch.float32).to(dtype)).evaluate()
    assert found["eval_kl"] == half["eval_kl"] != trainer(cache, tmp_path, student(torch.float32)).evaluate()["eval_kl"]
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights(made.model).items())


def test_push_to_hub(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for the Hub: the student's files and its tokenizer; no state of the training."""
    uploaded: dict[str, list[str]] = {}

    def upload(repo_id: str, folder_path: str, **more: Any) -> Any:
        uploaded[repo_id] = sorted(os.listdir(folder_path))
        return SimpleNamespace(commit_url="done")

    api = SimpleNamespace(create_repo=lambda name, **more: SimpleNamespace(repo_id=name), upload_folder=upload)
    module = __import__("transformers.trainer", fromlist=["trainer"])
    monkeypatch.setattr(module, "hf_api", lambda *a, **k: api)
    made = trainer(
        cache, tmp_path / "run", hub_model_id="someone/student", max_steps=1, eval_strategy="steps", eval_steps=1,
        card_teacher="Big Model",
    )  # fmt: skip
    made.train()
    made.push_to_hub()
    card = (tmp_path / "run" / "README.md").read_text()
    for part in (
        "library_name: transformers",
        "type: kl_sampled",
        "**Big Model**",
        cache.spec.hash,
        "alpha 0.3",
        "1 step",
    ):
        assert part in card, part
    assert {"README.md", "config.json", "model.safetensors"} <= set(uploaded["someone/student"])


@pytest.mark.parametrize("way", ["class", pytest.param("mixin", marks=pytest.mark.soak)])
def test_sft_trainer(cache: Cache, tmp_path: Path, way: str) -> None:
    """The numbers of a DistillTrainer, without a dataset of the user's."""
    trl = pytest.importorskip("trl")
    from fastkd.integrations.hf import DistillSFTTrainer

    plain = trainer(cache, tmp_path / "plain", max_steps=3)
    plain.train()
    kind: Any = DistillSFTTrainer if way == "class" else type("Mine", (DistillMixin, trl.SFTTrainer), {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's own, of transformers' names
        given = USUAL | {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "bf16": False}
        args = trl.SFTConfig(str(tmp_path / "sft"), per_device_train_batch_size=SIZE, **given)
    made = kind(student(), args, cache=cache, alpha=0.3, temperature=2.0, processing_class=tokenizer_of())
    made.train(resume_from_checkpoint=True)
    assert losses(made) == losses(plain)
    assert [line["step"] for line in made.state.log_history if "eval_kl" in line] == [2, 3]
    state = weights(plain.model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights(made.model).items())


def test_an_eval_dataset_of_ones_own(cache: Cache, tmp_path: Path) -> None:
    """Of an SFTTrainer: with its own measures."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from fastkd.integrations.hf import DistillSFTTrainer

    rows = Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 3, "labels": [[1, 2, 3, 4]] * 3})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's own, of transformers' names
        args = trl.SFTConfig(str(tmp_path), **(USUAL | {"max_steps": 1, "bf16": False}))
    model = student(torch.float32)
    made = DistillSFTTrainer(model, args, cache=cache, processing_class=tokenizer_of(), eval_dataset=rows)
    made.train()
    found = made.evaluate()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[1, 2, 3, 4]]), labels=torch.tensor([[1, 2, 3, 4]])).loss
    assert found["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert "eval_mean_token_accuracy" in found
    assert "forward" not in vars(model)


def refused(message: str, cache: Any, out: Path, model: Any = None, **changes: Any) -> None:
    with pytest.raises((TrainError, StreamError, fastkd.KDError), match=message):
        trainer(cache, out, model, **changes).train(resume_from_checkpoint=True)


def test_what_is_refused_before_the_first_step(cache: Cache, tmp_path: Path) -> None:
    narrow = student(vocab_size=50)
    refused(r"LlamaForCausalLM: got a vocabulary of 50; expected at least 96", cache, tmp_path, narrow)
    refused("fp16: got it with FSDP", cache, tmp_path, fp16=True, fsdp=True)
    refused("bf16_full_eval: got it with FSDP", cache, tmp_path, bf16_full_eval=True, fsdp=True)
    refused("label_smoothing_factor: got 0.1", cache, tmp_path, label_smoothing_factor=0.1)
    config = {"split_batches": True}
    refused("accelerator_config: got split_batches=True", cache, tmp_path, accelerator_config=config)
    refused("temperature: got 0.5", cache, tmp_path, loss={"temperature": 0.5})
    with pytest.raises(TrainError, match="objective: got one and alpha; expected one of the two"):
        DistillTrainer(student(), arguments(tmp_path), cache=cache, objective=fastkd.train, alpha=0.3)
    with pytest.raises(TypeError, match="rate"):
        DistillTrainer(student(), arguments(tmp_path), cache=cache, rate=0.1)
    for name, given in (("train_dataset", [1]), ("compute_loss_func", print)):
        with pytest.raises(TrainError, match=f"{name}: got one; expected none"):
            DistillTrainer(student(), arguments(tmp_path), cache=cache, **{name: given})
    nothing = make_cache(tmp_path / "nothing", held_out=0.0)
    refused("eval_strategy: got 'steps', and no documents of", nothing, tmp_path, eval_strategy="steps", eval_steps=1)
    with pytest.raises(TrainError, match="evaluate: no documents of"):
        trainer(nothing, tmp_path).evaluate()
    with pytest.raises(TrainError, match="got 2 GPUs in one process"):
        check_processes(2)


@pytest.mark.filterwarnings("ignore")  # torch.compile hides its own, unless they are errors
def test_compiled_layers(cache: Cache, tmp_path: Path) -> None:
    """A handful of graphs for all lengths, in training and evaluation, and the numbers of the model as it is."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = trainer(cache, tmp_path / "plain", max_steps=10)
    plain.train()
    made = trainer(
        cache, tmp_path / "run", torch_compile=True, torch_compile_backend="eager", max_steps=10, eval_strategy="steps",
        eval_steps=5,
    )  # fmt: skip
    made.train()
    assert losses(made) == pytest.approx(losses(plain), abs=1e-6)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    assert not hasattr(made.model, "_orig_mod")
    torch._dynamo.reset()


def test_columns_that_the_model_does_not_take(cache: Cache, tmp_path: Path) -> None:
    """remove_unused_columns, which is on by default, has nothing to remove: items are micro-batches, no rows."""
    for given in (True, False):
        made = trainer(cache, tmp_path, remove_unused_columns=given, max_steps=1)
        made.train()
        assert losses(made)


def test_another_tokenizer(tmp_path: Path) -> None:
    """Than the cache's; a folder brings its own, and so does processing_class."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"the quick brown fox {i}"}) + "\n" for i in range(20)))
    teacher, ours = saved(tmp_path / "teacher", "llama", vocab_size=300), tokenizer_of()
    ours.save_pretrained(teacher)
    fastkd.capture(str(teacher), str(text), tmp_path / "cache", k=4, draws=2, context=16, held_out=0.2)
    other = tokenizer_of(words="something else entirely " * 9)
    model = student(torch.float32, vocab_size=300)
    refused("is not the one of the cache", tmp_path / "cache", tmp_path / "run", model, processing_class=other)
    made = trainer(tmp_path / "cache", tmp_path / "run", model, processing_class=ours, max_steps=1)
    made.train()
    theirs = saved(tmp_path / "student", "llama", vocab_size=300)
    other.save_pretrained(theirs)
    refused("is not the one of the cache", tmp_path / "cache", tmp_path / "run2", theirs)
    loss = {"allow_other_tokenizer": True}
    made = trainer(tmp_path / "cache", tmp_path / "run3", theirs, loss=loss, max_steps=1)
    made.train()
    assert made.processing_class is not None


def test_a_resume_with_another_cache_or_loss(cache: Cache, tmp_path: Path) -> None:
    made = trainer(cache, tmp_path / "run", save_strategy="steps", save_steps=1, max_steps=2)
    made.train()
    other = make_cache(tmp_path / "other", k=4)
    refused("begun with other settings .*data", other, tmp_path / "run")
    refused("begun with other settings .*objective", cache, tmp_path / "run", loss={"alpha": 0.4})
    refused("begun with other settings .*data", cache, tmp_path / "run", per_device_train_batch_size=2)
    (tmp_path / "run" / "checkpoint-2" / "fastkd.json").write_text("{")
    refused("fastkd.json: cannot be read", cache, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-2" / "fastkd.json").unlink()
    refused("without fastkd.json, so not of a DistillTrainer", cache, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    # the same steps, divided otherwise
    again = trainer(cache, tmp_path / "run", accumulation=2, max_steps=2)
    again.train(resume_from_checkpoint=True)
    state = weights(made.model)
    for name, tensor in weights(again.model).items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=1e-9)
