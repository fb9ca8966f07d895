"""ONNX: ONNX Runtime answers as PyTorch does, on other batches and lengths than the example's; and what is refused."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vision_cases
from hf_cases import VOCAB, model_of
from torch import Tensor, nn
from train_cases import Tiny

from fastkd.deploy.formats import onnx as exporter
from fastkd.deploy.formats.onnx import graph as graphs
from fastkd.deploy.formats.onnx.layers import TRACED, Layers, LayersDiffer, alike_layers, first_layers, repeat_layers
from fastkd.deploy.formats.onnx.weights import packed
from fastkd.deploy.model import Deployable, load_deployable
from fastkd.deploy.runtime import Runtime, greedy
from fastkd.errors import ExportError
from fastkd.models.quantization import SCHEMES, Weights, fake_quantize, quantised_weights

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SHAPES = [(1, 1), (3, 20), (1, 40)]  # the example's is (2, 8), 3 of them in the cache


def ids_of(batch: int, length: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(batch * length).integers(0, VOCAB, (batch, length)))


def error_of(runtime: Runtime, model: Any, shapes: list[tuple[int, int]] = SHAPES) -> float:
    """The largest difference between logits, relative to the largest of the model's."""
    worst = 0.0
    for shape in shapes:
        ids = ids_of(*shape)
        with torch.no_grad():
            expected = model(ids).logits.numpy()
        found = runtime.logits(ids.numpy())
        assert found.dtype == np.float32
        assert found.shape == expected.shape
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
    return worst


def completion(model: Any, prompt: list[int]) -> list[int]:
    """32 tokens, also past one that ends a text."""
    model.generation_config.eos_token_id = None
    found = model.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False, pad_token_id=0)
    return list(found[0, len(prompt) :].tolist())


def fake_quantised(model: nn.Module, quantize: str) -> nn.Module:
    """A copy with the weights that a file of this scheme stands for."""
    made = copy.deepcopy(model)
    chosen = quantised_weights(made, SCHEMES[quantize])
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name in chosen:
                parameter.copy_(fake_quantize(parameter, chosen[name]))
    return made


def written(model: Deployable, folder: Path, quantize: str = "none", calibration: Any = None) -> tuple[Runtime, Any]:
    folder.mkdir()
    exporter.check(model, quantize)
    record = exporter.write(model, folder, quantize, calibration)
    return exporter.load(folder, record, torch.get_num_threads()), record


def initializer_bytes(folder: Path) -> int:
    graph = onnx.load(folder / exporter.FILE).graph
    return sum(onnx.numpy_helper.to_array(one).nbytes for one in graph.initializer)


@pytest.fixture(scope="module")
def llama() -> Deployable:
    size = {"hidden_size": 64, "num_hidden_layers": 5}  # two layers are copies of the third
    return load_deployable(model_of("llama", tie_word_embeddings=True, initializer_range=0.2, **size))


@pytest.fixture(scope="module")
def traced(llama: Deployable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph before its weights are placed, which takes seconds to make."""
    import onnx_ir

    past = graphs.keys_and_values(llama)
    assert not isinstance(past, str)
    path = tmp_path_factory.mktemp("traced") / "graph.onnx"
    onnx_ir.save(graphs.cached_graph(llama, past), path)
    return path


@pytest.fixture
def once(traced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx_ir

    monkeypatch.setattr(exporter, "_graph_of", lambda _: (onnx_ir.load(traced), []))


@pytest.mark.usefixtures("once")
def test_logits_and_completions_are_those_of_pytorch(llama: Deployable, tmp_path: Path) -> None:
    runtime, record = written(llama, tmp_path / "out")
    assert isinstance(runtime, Runtime)
    assert not record["notes"]
    assert error_of(runtime, llama.model) < 1e-4
    prompt = ids_of(1, 5)[0].tolist()
    expected = completion(llama.model, prompt)
    assert greedy(runtime, prompt, 32) == expected
    assert greedy(runtime, prompt, 32) == expected  # a prefill forgets the sequence before
    # the matrix that embedding and LM head share is there once
    parameters = sum(4 * p.numel() for p in llama.model.parameters())
    assert initializer_bytes(tmp_path / "out") < 1.02 * parameters
    runtime.close()


@pytest.mark.usefixtures("once")
def test_a_batch_with_pads_and_a_past_is_that_of_its_rows(llama: Deployable, tmp_path: Path) -> None:
    """The inputs that other programs give: an attention mask, positions, keys and values, but no number of rows."""
    runtime: Any = written(llama, tmp_path / "out")[0]
    session = runtime._session
    ids, pads = ids_of(2, 9), 4
    with torch.no_grad():
        expected = [llama.model(ids[0:1]).logits[0], llama.model(ids[1:, pads:]).logits[0]]
    mask = np.ones((2, 9), np.int64)
    mask[1, :pads] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    past = {name: np.zeros((2, heads, 0, width), np.float32) for name, (heads, width) in runtime._past.items()}
    names = [one.name for one in session.get_outputs()]
    begin = {"input_ids": ids[:, :6].numpy(), "attention_mask": mask[:, :6], "position_ids": positions[:, :6]}
    first = dict(zip(names, session.run(None, begin | past), strict=True))
    past = {name: first[name.replace("past_key_values", "present")] for name in past}
    end = {"input_ids": ids[:, 6:].numpy(), "attention_mask": mask, "position_ids": positions[:, 6:]}
    second = session.run(["logits"], end | past)[0]
    found = np.concatenate([first["logits"], second], 1)
    assert found[0] == pytest.approx(expected[0].numpy(), abs=1e-4)
    assert found[1, pads:] == pytest.approx(expected[1].numpy(), abs=1e-4)


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_weights_are_those_of_the_scheme(llama: Deployable, tmp_path: Path, quantize: str) -> None:
    runtime, _ = written(llama, tmp_path / "out", quantize)
    assert error_of(runtime, fake_quantised(llama.model, quantize)) < 0.15  # inputs of products are quantised, too
    assert greedy(runtime, [1, 2, 3], 8)
    # codes, the shared matrix once, scales (and zero points) of 16 or more inputs, and norms
    chosen = quantised_weights(llama.model, SCHEMES[quantize])
    numbers = {name: p.numel() for name, p in llama.model.named_parameters() if name in chosen}
    codes = sum(numbers[name] * how.bits // 8 for name, how in chosen.items())
    assert codes < initializer_bytes(tmp_path / "out") < codes + 5 * sum(numbers.values()) // 16 + 4096


def test_inputs_in_8_bits_are_smoothed_by_a_cache(tmp_path: Path) -> None:
    """A model in which one channel of what norms give is far larger than the others, and its weights as much smaller;
    with a tied LM head, whose token embedding is divided."""
    model = model_of("llama", tie_word_embeddings=True, initializer_range=0.2, hidden_size=64, num_hidden_layers=1)
    layer = model.model.layers[0]
    with torch.no_grad():
        for norm, readers in (
            (layer.input_layernorm, [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
            (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
        ):
            norm.weight[3] *= 200
            for reader in readers:
                reader.weight[:, 3] /= 200
    student = load_deployable(model)
    runtime, record = written(student, tmp_path / "out", "int8", ids_of(64, 16).split(1))
    assert not record["notes"]
    assert error_of(runtime, model, [(3, 20)]) < 0.1  # 0.9 without
    # the matrix that embedding and LM head share is there once
    assert initializer_bytes(tmp_path / "out") < 1.4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("how", [Weights(4, 32), Weights(8), Weights(8, 32)])
@pytest.mark.parametrize("inputs", [64, 32])
def test_codes_are_packed_as_they_are_read(how: Weights, inputs: int) -> None:
    weight = torch.randn(5, inputs, generator=torch.Generator().manual_seed(0))
    codes, scales = packed(weight, how, 32)
    found = np.zeros((5, inputs))
    for o in range(5):
        for i in range(inputs):
            at = i % 32
            byte = int(codes[o, i // 32, at if how.bits == 8 else at // 2])
            code = byte - 128 if how.bits == 8 else (byte >> (4 * (at % 2)) & 15) - 8
            found[o, i] = code * float(scales[o, i // 32])
    assert found == pytest.approx(fake_quantize(weight, how).double().numpy(), rel=1e-6)


def test_a_block_that_is_not_full_is_filled_with_zeros() -> None:
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    codes, scales = packed(weight, Weights(8), 32)
    assert codes.shape == (3, 2, 32)
    assert (codes[:, 1, 8:] == 128).all()
    assert (scales[:, 0] == scales[:, 1]).all()


@pytest.mark.usefixtures("once")
def test_large_weights_lie_in_a_file_of_their_own(
    llama: Deployable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "EXTERNAL", 0)
    runtime, _ = written(llama, tmp_path / "out")
    assert error_of(runtime, llama.model, [(3, 20)]) < 1e-4
    parameters = sum(4 * p.numel() for p in llama.model.parameters())
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > 0.9 * parameters
    (tmp_path / "out" / exporter.FILE).write_bytes(b"not a graph")
    with pytest.raises(ExportError, match=r"onnxruntime [\d.]+ cannot load it .* Export again\.$"):
        exporter.load(tmp_path / "out", {"file": exporter.FILE}, 1)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma", "gemma2", "gemma3", "mistral", "gpt2", "phi"])
def test_architectures(name: str, tmp_path: Path) -> None:
    depth = {"num_hidden_layers": 5} if name not in ("gemma2", "gemma3") else {}  # those have layers of two kinds
    model = load_deployable(model_of(name, **depth))
    assert (alike_layers(model.model, 5) is not None) == bool(depth)
    runtime, record = written(model, tmp_path / "out")
    assert not record["notes"]
    assert error_of(runtime, model.model) < 1e-4
    prompt = ids_of(1, 6)[0].tolist()
    assert greedy(runtime, prompt, 32) == completion(model.model, prompt)
    if name == "gpt2":  # its layers are none of PyTorch
        with pytest.raises(ExportError, match="got int4 for GPT2LMHeadModel; expected linear layers"):
            exporter.check(model, "int4")
        return
    quantised, _ = written(model, tmp_path / "int4", "int4")
    assert error_of(quantised, fake_quantised(model.model, "int4")) < 0.15


def test_layers_are_alike_but_for_their_parameters(llama: Deployable) -> None:
    model = copy.deepcopy(llama.model)
    layers: Any = model.get_submodule("model.layers")
    found = alike_layers(model, 5)
    assert found is not None
    assert found.name == "model.layers"
    with first_layers(found):
        assert len(model.get_submodule("model.layers")) == TRACED  # type: ignore[arg-type]
    assert model.get_submodule("model.layers") is layers
    assert alike_layers(model, 4) is None
    for change in (
        lambda layer: setattr(layer.input_layernorm, "variance_epsilon", 0.5),
        lambda layer: setattr(layer.self_attn, "scaling", 0.5),
        lambda layer: setattr(layer.mlp, "act_fn", nn.ReLU()),
        lambda layer: setattr(layer.mlp, "up_proj", nn.Linear(64, 3)),
        lambda layer: layer.mlp.register_buffer("shift", torch.ones(1)),
    ):
        other = copy.deepcopy(llama.model)
        change(other.get_submodule("model.layers.4"))
        assert alike_layers(other, 5) is None
    assert alike_layers(load_deployable(model_of("llama", num_hidden_layers=3)).model, 3) is None  # nothing is gained


@pytest.mark.parametrize("change", ["shared", "one module", "lists of tensors", "dtypes", "said by the config"])
def test_layers_that_only_look_alike(llama: Deployable, change: str) -> None:
    model: Any = copy.deepcopy(llama.model)
    layers = model.model.layers
    if change == "shared":  # by the last two alone, so that the traced ones do not show it
        layers[4].mlp = layers[3].mlp
    elif change == "one module":
        for index in range(1, 5):
            layers[index].mlp = layers[0].mlp
    elif change == "said by the config":  # the model, and not its layers, may act by it
        model.config.layer_types = ["sliding_attention"] * 3 + ["full_attention"] * 2
    for index, layer in enumerate(layers):
        if change == "lists of tensors":  # == between them has no truth value
            layer.values = [torch.zeros(3)]
        elif change == "dtypes":
            layer.values = torch.ones(3, dtype=torch.float64 if index == 4 else torch.float32)
    assert alike_layers(model, 5) is None


def test_copies_are_of_nodes_that_are_alike() -> None:
    """The graph of a decoder in which the third layer has other nodes than the second is not repeated."""
    import onnx_ir as ir

    def graph_of(factor: float) -> Any:
        x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
        nodes, value = [], x
        for layer in range(TRACED):
            scale = ir.node("Constant", [], {"value_float": factor if layer == 2 else 1.0})
            nodes += [scale, ir.node("Mul", [value, scale.outputs[0]])]
            for node in nodes[-2:]:
                node.metadata_props["pkg.torch.onnx.name_scopes"] = f"['', 'model.layers.{layer}', 'mul']"
            value = nodes[-1].outputs[0]
        nodes.append(ir.node("Neg", [value]))
        return ir.Graph([x], nodes[-1].outputs, nodes=nodes, opset_imports={"": 18})

    layers = Layers(nn.Module(), "layers", "layers", nn.ModuleList(nn.Identity() for _ in range(5)))
    graph = graph_of(1.0)
    repeat_layers(graph, layers, "model.")
    assert [node.op_type for node in graph] == ["Constant", "Mul"] * 5 + ["Neg"]
    value = graph.outputs[0]
    for _ in range(6):  # through five products to the input
        value = value.producer().inputs[0]
    assert value is graph.inputs[0]
    with pytest.raises(LayersDiffer):
        repeat_layers(graph_of(2.0), layers, "model.")


def test_copies_read_their_own_buffers_and_a_value_read_beside_the_layers_is_noticed() -> None:
    import onnx_ir as ir

    def graph_of(read: int) -> Any:
        kind = ir.TensorType(ir.DataType.FLOAT)
        x, nodes = ir.Value(name="x", shape=ir.Shape([2]), type=kind), []
        scales = []
        for layer in range(TRACED):
            data = ir.tensor(np.full(2, layer, np.float32), name=f"model.layers.{layer}.scale")
            scales.append(ir.Value(name=data.name, shape=ir.Shape([2]), type=kind, const_value=data))
            nodes.append(ir.node("Mul", [nodes[-1].outputs[0] if nodes else x, scales[-1]]))
            nodes[-1].metadata_props["pkg.torch.onnx.name_scopes"] = f"['', 'model.layers.{layer}', 'mul']"
        end = ir.node("Add", [nodes[-1].outputs[0], nodes[read].outputs[0]])
        opset = {"": 18}
        return ir.Graph([x], end.outputs, nodes=[*nodes, end], initializers=scales, opset_imports=opset)

    modules = nn.ModuleList(nn.Identity() for _ in range(5))
    for index, module in enumerate(modules):
        module.register_buffer("scale", torch.full((2,), float(index)))
    layers = Layers(nn.Module(), "layers", "layers", modules)
    graph = graph_of(read=2)
    repeat_layers(graph, layers, "model.")
    found = {name: value.const_value.numpy().tolist() for name, value in graph.initializers.items()}
    assert found == {f"model.layers.{index}.scale": [index, index] for index in range(5)}
    for read in (0, 1):  # as in the mean of the states of all layers
        with pytest.raises(LayersDiffer):
            repeat_layers(graph_of(read), layers, "model.")


@pytest.mark.soak
def test_where_layers_differ_each_is_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "alike_layers", partial(_as_if_alike, graphs.alike_layers))
    model = load_deployable(model_of("gpt2", num_hidden_layers=5, scale_attn_by_inverse_layer_idx=True))
    runtime, _ = written(model, tmp_path / "out")
    assert error_of(runtime, model.model) < 1e-4


def _as_if_alike(find: Any, model: nn.Module, count: int) -> Any:
    assert find(model, count) is None
    name, modules = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
    owner, _, attribute = name.rpartition(".")
    return Layers(model.get_submodule(owner), attribute, name, modules)


@pytest.mark.soak
def test_a_state_that_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"got MambaForCausalLM, which torch.onnx.export cannot take \("):
        written(load_deployable(model_of("mamba")), tmp_path / "out")


def test_a_text_module_runs_again_for_each_token(tmp_path: Path) -> None:
    model = load_deployable(Tiny(seed=1))
    runtime, _ = written(model, tmp_path / "out")
    ids = ids_of(3, 7)
    with torch.no_grad():
        assert runtime.logits(ids.numpy()) == pytest.approx(model.plain(ids).numpy(), rel=1e-4, abs=1e-4)
    sequence = ids[0].tolist()
    for token in greedy(runtime, sequence, 4):
        with torch.no_grad():
            assert token == int(model.plain(torch.tensor([sequence]))[0, -1].argmax())
        sequence = [*sequence, token]


def test_a_classifier_with_fixed_ranges_of_inputs(tmp_path: Path) -> None:
    images = torch.randn(60, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    net = vision_cases.Net(seed=3)
    model = load_deployable(net, examples=images[:1])
    with torch.no_grad():
        expected = net(images).numpy()
    spread = expected.std()
    for name, quantize, calibration, most in (
        ("none", "none", None, 1e-5), ("weights", "int8", None, 0.05), ("static", "int8", images.split(20), 0.3),
    ):  # fmt: skip
        runtime, record = written(model, tmp_path / name, quantize, calibration)
        assert np.abs(runtime.logits(images.numpy()) - expected).max() < most * spread, name
        assert len(record["notes"]) == (name == "weights")
        assert [path.name for path in (tmp_path / name).iterdir()] == [exporter.FILE]
    kinds = {node.op_type for node in onnx.load(tmp_path / "static" / exporter.FILE).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= kinds


class Loop(nn.Module):
    """Does something else for each value of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(40, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        if int(ids.sum()) > 100:
            ids = ids + 1
        states: Tensor = self.linear(torch.nn.functional.one_hot(ids % 40, 40).float())
        return states


def test_what_is_refused(tmp_path: Path) -> None:
    model = load_deployable(Loop())
    with pytest.raises(ExportError) as refused:
        written(model, tmp_path / "out")
    text = str(refused.value)
    assert text.startswith("Loop: got Loop, which torch.onnx.export cannot take (")
    assert text.endswith("expected a model without Python control flow that depends on its inputs.")
    assert "\n" not in text
    assert len(text) < 400
    with pytest.raises(ExportError, match=r"^quantize: got int4 for linear, which has 40 inputs; expected a multiple"):
        exporter.check(model, "int4")
