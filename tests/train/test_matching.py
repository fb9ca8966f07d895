"""Entries of --match: what they mean, what auto chooses, and what is refused."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from hf_cases import model_of

from fastkd.errors import TrainError
from fastkd.models.hub import load_transformers
from fastkd.models.pruned import (
    OriginalLayers,
    keep_layers,
    kept_layers,
    note_original_layers,
    original_layers,
)
from fastkd.train.matching import Auto, Match, StudentLayers, attention_at, feature_named, parse, resolve, state_at

LOSSES = ("mse", "cosine", "attention", "relation", "hint", "at")
KEPT = OriginalLayers((0, 1, 3, 4, 5, 6, 8, 9), 10)
PRUNED = StudentLayers("pruned", 8, ("layers.0.mlp",), KEPT)
THIN = StudentLayers("thin", 4, ("block.mlp", "layers.0.mlp"))
IMAGES = StudentLayers("net", 0, ("layers.3", "layers.6", "head"))


@dataclass(frozen=True)
class Spec:
    """As much of a feature's spec as matching reads."""

    kind: str = "state"
    layer: int | None = None
    layers: int | None = 10
    block: str | None = None


STATES = {"2": Spec(layer=2), "5": Spec(layer=5, block="0" * 64), "-1": Spec(layer=10)}
MAPS = {"layers.3": Spec("map", layers=None), "layers.3:at": Spec("attention_map", layers=None)}


def named(entries: list[str], features: dict[str, Spec] = STATES, student: StudentLayers = THIN) -> list[str]:
    return [str(match) for match in resolve(entries, features, student, LOSSES).matches]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20:16:mse:0.1", Match("20", "16", "mse", 0.1)),
        ("-1:-1:cosine:auto", Match("-1", "-1", "cosine", None)),
        ("layers.3:at:layers.1:at:1000", Match("layers.3:at", "layers.1", "at", 1000.0)),
        ("layers.3:layers.1:at:2", Match("layers.3", "layers.1", "at", 2.0)),
        ("20:16:mse:1e-3", Match("20", "16", "mse", 1e-3)),
        ("auto", Auto()),
        ("auto:cosine", Auto("cosine")),
        ("auto:cosine:3", Auto("cosine", 3.0)),
    ],
)
def test_parsed(text: str, expected: Match | Auto) -> None:
    assert parse(text) == expected
    if isinstance(expected, Match):
        assert parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    ["", "20", "20:16:mse", "20:16:mse:", "20::mse:1", "a:b:c:d:1", "20:16:mse:0", "20:16:mse:-1", "20:16:mse:nan",
     "20:16:mse:inf", "20:16:mse:much", "auto:", "auto:mse:1:2", "auto:mse:0"],
)  # fmt: skip
def test_not_parsed(text: str) -> None:
    with pytest.raises(TrainError, match="match: got "):
        parse(text)


def test_names_are_those_of_cache_and_student() -> None:
    assert named(["10:-1:mse:1"]) == ["-1:4:mse:1"]
    assert named(["-6:-5:mse:auto"]) == ["5:0:mse:auto"]
    assert named(["5:-1:attention:0.5"]) == ["5:3:attention:0.5"]
    assert [m.output for m in resolve(["5:-1:relation:1", "5:-1:mse:1"], STATES, THIN, LOSSES).matches] == [
        "attention:3", "state:4",
    ]  # fmt: skip
    (match,) = resolve(["2:block.mlp:mse:1"], STATES, THIN, LOSSES).matches
    assert match.output == "module:block.mlp"
    thirty = {"-1": Spec(layer=30, layers=30), "29": Spec(layer=29, layers=30)}
    assert [feature_named(name, thirty) for name in ("30", "-1", "-2", "29", "31", "-32", "x")] == [
        "-1", "-1", "29", "29", None, None, None,
    ]  # fmt: skip


def test_of_a_pruned_copy_states_enter_the_same_layers() -> None:
    for place, number in enumerate(KEPT.layers):
        assert state_at(number, 10, PRUNED) == place
        assert attention_at(number, 10, PRUNED) == place
    # layer 2 is gone: what entered it enters layer 3; its attention is that of layer 1
    assert state_at(2, 10, PRUNED) == 2
    assert attention_at(2, 10, PRUNED) == 1
    assert state_at(10, 10, PRUNED) == 8
    # of another teacher, it is no copy
    assert state_at(30, 30, PRUNED) == 8
    assert state_at(15, 30, PRUNED) == 4


@pytest.mark.parametrize("layers", [1, 2, 4, 7, 10])
def test_uniformly_last_to_last(layers: int) -> None:
    student = StudentLayers("some", layers)
    states = [state_at(layer, 10, student) for layer in range(11)]
    assert states == sorted(states)
    assert set(states) == set(range(layers + 1))
    attention = [attention_at(layer, 10, student) for layer in range(10)]
    assert attention == sorted(attention)
    assert set(attention) == set(range(layers)) if layers > 1 else attention == [0] * 10
    assert max(abs(at / layers - layer / 10) for layer, at in enumerate(states)) <= 0.5 / layers


def test_auto() -> None:
    assert named(["auto"]) == ["2:1:mse:auto", "5:2:mse:auto", "-1:4:mse:auto"]
    assert named(["auto:cosine:2"], student=PRUNED) == ["2:2:cosine:2", "5:4:cosine:2", "-1:8:cosine:2"]
    # the last state has no attention after it, and feature 2 no block
    found = resolve(["auto:attention"], STATES, PRUNED, LOSSES)
    assert [str(match) for match in found.matches] == ["5:4:attention:auto"]
    assert any("leaves out 2, -1" in note for note in found.notes)
    # each state of the student once: the feature that enters the same layer, not the one before it
    close = {"3": Spec(layer=3), "2": Spec(layer=2)}
    found = resolve(["auto"], close, PRUNED, LOSSES)
    assert [str(match) for match in found.matches] == ["3:2:mse:auto"]
    assert "original layers): 3:2" in found.notes[0]
    assert "leaves out 2:" in found.notes[1]
    # what is named by hand stays as it is
    assert named(["5:1:cosine:1", "auto"]) == ["5:1:cosine:1", "2:1:mse:auto", "-1:4:mse:auto"]
    assert named(["auto"], MAPS, IMAGES) == ["layers.3:layers.3:hint:auto", "layers.3:at:layers.3:at:auto"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("7:1:mse:1", r"got '7:1:mse:1'; expected a feature of the cache, which has 2, 5, -1"),
        ("5:5:mse:1", r"thin has 4 layers; expected a number from 0 to 4 \(what enters the final norm\)"),
        ("5:4:attention:1", "thin has 4 layers; expected a number from 0 to 3, or"),
        ("5:-6:mse:1", "thin has 4 layers"),
        ("2:1:attention:1", "feature 2 comes without the weights .* --feature-block"),
        ("-1:1:relation:1", "no layer follows what enters the final norm"),
        ("5:1:mes:1", "expected a loss of at, attention, cosine"),
        ("5:mlp:mse:1", r"the name of a module of thin \(it has block.mlp, layers.0.mlp\)"),
    ],
)
def test_refused(entry: str, message: str) -> None:
    with pytest.raises(TrainError, match=message):
        named([entry])


def test_refused_with_others() -> None:
    with pytest.raises(TrainError, match="5:1:mse twice"):
        named(["5:1:mse:1", "-6:1:mse:2"])
    with pytest.raises(TrainError, match="expected auto once"):
        named(["auto", "auto:cosine"])
    with pytest.raises(TrainError, match="the cache has no features"):
        named(["auto"], {})
    with pytest.raises(TrainError, match="has no list of layers"):
        named(["5:1:mse:1"], student=IMAGES)
    with pytest.raises(TrainError, match="none of the features 2, 5, -1 of the cache has"):
        named(["auto"], student=IMAGES)
    with pytest.raises(TrainError, match="expected the state that enters a layer"):
        named(["layers.3:head:attention:1"], MAPS, IMAGES)


def test_a_pruned_copy_knows_its_layers(tmp_path: Path) -> None:
    """Also when it was saved, loaded and pruned again; what cannot be so is not believed."""
    model = model_of("llama", num_hidden_layers=10)
    assert original_layers(model) is None
    keep_layers(model, kept_layers(10, 5))
    assert original_layers(model) == KEPT
    model.save_pretrained(tmp_path)
    loaded = load_transformers().AutoModelForCausalLM.from_pretrained(tmp_path)
    assert original_layers(loaded) == KEPT
    keep_layers(loaded, [0, 2, 7])
    assert original_layers(loaded) == OriginalLayers((0, 3, 9), 10)
    for wrong in ([0, 3], [0, 9, 3], [0, 3, 10], [-1, 3, 9], [0, 3, True], "039", None):
        loaded.config.fastkd_original_layers = wrong
        assert original_layers(loaded) is None
    note_original_layers(loaded, [0, 1], 3)
    assert loaded.config.fastkd_original_layers == [0, 1]
