"""A student initialised from its teacher: what is copied, what is fitted, what is left, and what is refused."""

from typing import Any

import pytest
import torch
from hf_cases import VOCAB, model_of
from torch import nn
from train_cases import Tiny

from fastkd.errors import TrainError
from fastkd.models.pruned import OriginalLayers, keep_layers, original_layers
from fastkd.stream.batch import MicroBatch
from fastkd.train.layer_init import RIDGE, initialise, sources
from fastkd.train.matching import StudentLayers
from fastkd.train.student import of_module, of_transformers

TOKENS = torch.randint(0, VOCAB, (4, 30), generator=torch.Generator().manual_seed(0))


def batch(tokens: torch.Tensor = TOKENS, short: int = 0) -> MicroBatch:
    """Rows of tokens, the last one `short` shorter."""
    rows, length = tokens.shape
    lengths = torch.tensor([length] * (rows - 1) + [length - short])
    given: Any = {"labels": tokens, "sequences": torch.arange(rows), "targets": None, "positions": int(lengths.sum())}
    return MicroBatch(
        input_ids=tokens, position_ids=torch.arange(length).expand(rows, -1),
        cu_seqlens=torch.tensor([0, *lengths.cumsum(0).tolist()]), max_seqlen=length, layout="padded", **given,
    )  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def test_which_layers() -> None:
    kept = OriginalLayers((0, 1, 3, 4), 5)
    assert sources(StudentLayers("s", 4, (), kept), 5) == [0, 1, 3, 4]
    assert sources(StudentLayers("s", 4, (), kept), 6) != [0, 1, 3, 4]
    for count in range(1, 9):
        for layers in range(1, count + 1):
            found = sources(StudentLayers("s", layers), count)
            assert found == sorted(set(found))
            assert found[-1] == count - 1  # last to last
    assert sources(StudentLayers("s", 6), 6) == [0, 1, 2, 3, 4, 5]
    assert sources(StudentLayers("s", 2), 6) == [2, 5]
    # what enters layer 1 is to be what enters layer 5; and between matches evenly
    assert sources(StudentLayers("s", 2), 6, [(5, 1)]) == [4, 5]
    assert sources(StudentLayers("s", 4), 12, [(8, 2)]) == [3, 7, 9, 11]
    # matches that cross, or are of the ends, do not count
    assert sources(StudentLayers("s", 4), 12, [(8, 2), (3, 3), (0, 0), (12, 4)]) == [3, 7, 9, 11]
    assert sources(StudentLayers("s", 4), 2) == [0, 0, 1, 1]


def test_all_layers_make_the_teacher() -> None:
    teacher, model = (model_of("llama", seed=seed, num_hidden_layers=3) for seed in (0, 1))
    student = of_transformers(model, "s")
    assert not torch.allclose(logits(model), logits(teacher), atol=1e-3)
    found = initialise(student, teacher, [0, 1, 2])
    assert found.layers == (0, 1, 2)
    assert (found.embedding, found.norm, found.lm_head) == ("copied", "copied", "copied")
    torch.testing.assert_close(logits(model), logits(teacher), rtol=0, atol=0)
    assert original_layers(model) is None
    assert not found.notes


def test_some_layers_make_a_pruned_copy() -> None:
    teacher, pruned = (model_of("llama", num_hidden_layers=5) for _ in range(2))
    keep_layers(pruned, [0, 2, 4])
    model = model_of("llama", seed=1, num_hidden_layers=3)
    found = initialise(of_transformers(model, "s"), teacher, [0, 2, 4])
    torch.testing.assert_close(logits(model), logits(pruned), rtol=0, atol=0)
    assert original_layers(model) == original_layers(pruned) == OriginalLayers((0, 2, 4), 5)
    assert "layers: 0 from 0, 1 from 2, 2 from 4\nembeddings: copied" in found.text


def test_a_layer_that_is_not_the_same_function_is_left() -> None:
    """As many heads of half the size have weights of the same shapes."""
    teacher = model_of("llama", num_attention_heads=4, num_key_value_heads=4)
    model = model_of("llama", seed=1, num_attention_heads=2, num_key_value_heads=2)
    before = {name: x.clone() for name, x in model.model.layers.state_dict().items()}
    found = initialise(of_transformers(model, "s"), teacher, [0, 1])
    assert found.layers == (None, None)
    assert found.embedding == "copied"
    assert all(torch.equal(x, before[name]) for name, x in model.model.layers.state_dict().items())
    assert found.notes == ["layer 0 was left as it was: with the teacher's weights it returns something else"]


def test_a_thin_student_gets_embeddings_and_head_by_least_squares() -> None:
    teacher = model_of("llama")
    model = model_of("llama", seed=1, hidden_size=16, num_attention_heads=2, num_key_value_heads=2)
    before = {name: x.clone() for name, x in model.model.layers.state_dict().items()}
    found = initialise(of_transformers(model, "s"), teacher, [0, 1], iter([batch(short=7)]))
    assert found.layers == (None, None)
    assert "(16,), the teacher's (32,)" in found.notes[0]
    assert all(torch.equal(x, before[name]) for name, x in model.model.layers.state_dict().items())
    # the best of rank 16, up to a rotation: what is left of the squares is in the smaller singular values
    wide, thin = teacher.get_input_embeddings().weight.double(), model.get_input_embeddings().weight.double()
    values = torch.linalg.svdvals(wide)
    rest = (wide - thin @ torch.linalg.lstsq(thin, wide).solution).square().sum()
    torch.testing.assert_close(rest, values[16:].square().sum(), rtol=1e-5, atol=0)
    assert "16 of 32 components" in found.embedding
    # the head against a solution of the normal equations by another way, on the positions that are no pads
    real = batch(short=7).padding_mask().flatten()
    with torch.no_grad():
        s, x = (m.model(TOKENS).last_hidden_state.flatten(0, 1)[real].double() for m in (model, teacher))
    damping = (RIDGE * s.square().sum() / 16) ** 0.5 * torch.eye(16, dtype=torch.float64)
    wanted = torch.cat([x @ teacher.lm_head.weight.double().T, torch.zeros(16, VOCAB, dtype=torch.float64)])
    expected = torch.linalg.lstsq(torch.cat([s, damping]), wanted).solution.T
    torch.testing.assert_close(model.lm_head.weight.double(), expected, rtol=1e-4, atol=1e-6)
    assert found.lm_head == "by least squares, over 113 positions"
    assert found.norm == "left as it was"


def test_few_positions_and_tied_heads() -> None:
    teacher, thin = model_of("llama"), {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = model_of("llama", seed=1, **thin)
    found = initialise(of_transformers(model, "s"), teacher, [0, 1], [batch(TOKENS[:1])])
    assert found.lm_head == "left as it was: 30 positions are too few for its 16 components"
    tied = model_of("llama", seed=1, tie_word_embeddings=True, **thin)
    found = initialise(of_transformers(tied, "s"), teacher, [0, 1])
    assert found.lm_head == "tied to the embeddings"
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_nothing_fits() -> None:
    teacher = model_of("llama")
    model = model_of("llama", seed=1, hidden_size=48, num_attention_heads=2, num_key_value_heads=2, vocab_size=80)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(TrainError, match=r"nothing of its teacher fits it \(layer 0 was left as it was: its .*48"):
        initialise(of_transformers(model, "s"), teacher, [0, 1])
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    with pytest.raises(TrainError, match="has no list of layers"):
        initialise(of_module(nn.Sequential(nn.Embedding(VOCAB, 4), nn.Linear(4, VOCAB)), "plain"), teacher, [])


def test_another_rotary_embedding_is_noted() -> None:
    teacher = model_of("llama")
    model = model_of("llama", seed=1, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    found = initialise(of_transformers(model, "s"), teacher, [0, 1])
    assert found.layers == (0, 1)
    assert "rope_parameters: other than the teacher's" in found.notes[0]


def test_modules_of_ones_own() -> None:
    teacher, model = Tiny(seed=3), Tiny(seed=4)
    found = initialise(of_module(model, "tiny"), teacher, [2, 1, 0])
    assert found.layers == (2, 1, 0)
    for ours, theirs in zip(model.layers, reversed(teacher.layers), strict=True):
        assert torch.equal(ours.weight, theirs.weight)
    assert found.embedding == found.lm_head == "left as it was"
