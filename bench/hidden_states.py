"""Hidden states of a real teacher, and what its other layers make of them: the problem of the features suite."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fastkd.bench.suites import RunConfig

STATES = Path("build/smollm2_states.npz")
LAYER, WINDOW = 29, 512
LEARNT, HELD = 32, 32
"""Windows that the basis is learnt from, and held-out ones."""
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Problem:
    """States that enter a layer of a teacher, in windows of `window` positions.

    learnt, held `[n, D]`: positions for the basis, and held-out ones. rest: the log-probabilities `[L, V]` that the
    rest of the teacher gives to the states `[L, D]` of a window. name: for titles.
    """

    name: str
    learnt: Floats
    held: Floats
    window: int
    rest: Callable[[Tensor], Tensor]

    @torch.inference_mode()
    def divergences(self, decoded: dict[str, Floats], windows: int) -> dict[str, NDArray[np.float64]]:
        """KL from the teacher with exact states to the teacher with decoded ones, in nats, at each position of some
        held-out windows, spread evenly. decoded: by name, `[n, D]`."""
        found: dict[str, list[NDArray[np.float64]]] = {name: [] for name in decoded}
        last = len(self.held) // self.window - 1
        for number in np.linspace(0, last, windows).round().astype(int).tolist():
            some = slice(number * self.window, (number + 1) * self.window)
            exact = self.rest(torch.from_numpy(self.held[some]))
            for name, states in decoded.items():
                other = self.rest(torch.from_numpy(np.ascontiguousarray(states[some])))
                found[name].append((exact.exp() * (exact - other)).sum(-1).double().numpy())
        return {name: np.concatenate(parts) for name, parts in found.items()}


def smollm2(ask: RunConfig) -> Problem:
    """SmolLM2-135M over windows of CPython's language reference, in its order; its states are kept in `STATES`."""
    from fastkd.bench.teacher import load_teacher
    from fastkd.demo.corpus import language_reference

    model, tokenizer = load_teacher(None)
    if not STATES.exists():
        tokens = tokenizer(next(language_reference()), return_tensors="np", verbose=False)["input_ids"][0]
        windows = tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW).astype(np.int64)
        some = np.sort(np.random.default_rng(0).permutation(len(windows))[: LEARNT + HELD])
        STATES.parent.mkdir(exist_ok=True)
        np.savez(STATES, states=read_states(model, torch.from_numpy(windows[some]), LAYER))
    with np.load(STATES) as file:
        states = file["states"]
    learnt = LEARNT * WINDOW
    name = f"the state that enters layer {LAYER} of SmolLM2-135M, over English prose"
    return Problem(name, states[:learnt], states[learnt:], WINDOW, rest_of(model, LAYER))


@torch.inference_mode()
def read_states(model: Any, windows: Tensor, layer: int) -> Floats:
    """The states that enter a layer `[n, D]`, from one pass that ends there."""
    from fastkd.models.taps import Taps

    found = []
    with Taps(model, [str(layer)]) as taps:
        for window in windows:
            model.model(window[None], use_cache=False)
            found.append(taps.take()[str(layer)][0].numpy())
    return np.concatenate(found)


def rest_of(model: Any, layer: int) -> Callable[[Tensor], Tensor]:
    """A Llama-like model from a layer on: its log-probabilities `[L, V]` for states `[L, D]`. The model is cut."""
    model.model.layers = nn.ModuleList(list(model.model.layers)[layer:])
    model.config.num_hidden_layers = len(model.model.layers)

    def rest(states: Tensor) -> Tensor:
        return F.log_softmax(model(inputs_embeds=states[None], use_cache=False).logits[0].float(), -1)

    return rest


def made_up(width: int = 24, window: int = 32, windows: int = 24) -> Problem:
    """States of a falling spectrum, with a sink at the start of each window, and a random linear teacher."""
    g = torch.Generator().manual_seed(0)
    states = torch.randn(windows * window, width, generator=g) @ (
        torch.randn(width, width, generator=g) * torch.linspace(2, 0.2, width)
    )
    states[::window] *= 100
    head = torch.randn(64, width, generator=g) / width**0.5
    found = states.numpy()
    half = len(found) // 2
    return Problem(
        "made up", found[:half], found[half:], window,
        lambda x: F.log_softmax(3 * F.rms_norm(x, (width,)) @ head.T, -1),
    )  # fmt: skip
