"""`safetensors`: the student in transformers' own format, run by PyTorch. The reference that others are compared with.

Of a causal model of transformers, the folder that `from_pretrained` loads; of another module, its weights, and the
function that makes it is called again.
"""

from inspect import signature
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from ...errors import ExportError, TeacherError
from ...models.hf import load_causal_lm
from ...models.hub import ModelFiles
from ...models.module import TEXT
from ...models.trained import WEIGHTS
from ..calibration import Calibration
from ..model import Deployable, made_again, plain_logits
from ..runtime import Floats

EXTRA = ""
PACKAGES: tuple[str, ...] = ()
QUANTIZE = ("none",)


def check(model: Deployable, quantize: str) -> None:
    if model.config is None and model.factory is None:
        raise ExportError(
            f"to: got 'safetensors' for {model.name}, a torch module that was given; expected "
            "trained:module:factory@RUN/student, so that the exported weights can be loaded again."
        )


def write(model: Deployable, folder: Path, quantize: str, calibration: Calibration | None) -> dict[str, Any]:
    if model.config is not None:
        cast(Any, model.model).save_pretrained(folder)
        return {"factory": None}
    # clones: tensors that share memory are each written
    save_file({name: tensor.clone() for name, tensor in model.model.state_dict().items()}, folder / WEIGHTS)
    return {"factory": model.factory}


def load(folder: Path, written: dict[str, Any], threads: int) -> "TorchRuntime":
    if written["factory"] is not None:
        return TorchRuntime(made_again(written["factory"], folder), threads)
    try:
        files = ModelFiles(folder, folder.name)
        return TorchRuntime(load_causal_lm(folder, files, notes=[], dtype=torch.float32), threads)
    except TeacherError as error:
        raise ExportError(str(error)) from error


class TorchRuntime:
    """See `Runtime`. model: of transformers, most of which have a KV cache; or any module, whose sequence is run again
    for each token. threads: of PyTorch in this process."""

    def __init__(self, model: nn.Module, threads: int) -> None:
        torch.set_num_threads(threads)
        self.name = f"PyTorch {torch.__version__}"
        self._model = model.eval()
        takes = signature(model.forward).parameters
        self._cached = hasattr(model, "get_output_embeddings") and "past_key_values" in takes
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._keys_and_values: Any = None
        self._sequence = torch.zeros((1, 0), dtype=torch.int64)

    @torch.inference_mode()
    def logits(self, inputs: NDArray[Any]) -> Floats:
        return self._numpy(plain_logits(self._model, torch.from_numpy(inputs), None))

    @torch.inference_mode()
    def prefill(self, ids: NDArray[np.int64]) -> Floats:
        self._keys_and_values, self._sequence = None, torch.zeros((1, 0), dtype=torch.int64)
        return self._continued(torch.from_numpy(ids))

    @torch.inference_mode()
    def decode(self, token: int) -> Floats:
        return self._continued(torch.tensor([[token]]))

    def close(self) -> None:
        self._keys_and_values = None

    def _continued(self, ids: Tensor) -> Floats:
        if self._cached:
            output = self._model(input_ids=ids, past_key_values=self._keys_and_values, use_cache=True, **self._last)
            self._keys_and_values = output.past_key_values
            return self._numpy(output.logits[0, -1])
        self._sequence = torch.cat([self._sequence, ids], 1)
        return self._numpy(plain_logits(self._model, self._sequence, TEXT)[0, -1])

    @staticmethod
    def _numpy(logits: Tensor) -> Floats:
        return np.ascontiguousarray(logits.float().numpy())
