"""The weights of a trained module that is not one of transformers, back in such a module."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn, no_grad

WEIGHTS = "model.safetensors"


def load_trained(model: nn.Module, folder: str | Path, error: type[Exception]) -> nn.Module:
    """Load the weights that a training exported (RUN/student/model.safetensors) into a module of the same kind, in
    place; returns it. Raises `error` if they cannot be read, or are those of another module."""
    path = Path(folder) / WEIGHTS
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as problem:
        raise error(f"{path}: cannot be read ({problem}); expected the weights of a trained module.") from problem
    own: dict[str, Tensor] = dict(model.named_parameters())
    persistent = model.state_dict().keys()
    own |= {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    shapes, found = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (own, stored))
    if different := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
        name = different[0]
        raise error(
            f"{path}: got {name} of shape {found.get(name, 'none')}; expected {shapes.get(name, 'none')}, as in "
            f"{type(model).__name__} ({len(different)} such tensors). Name the module that was trained."
        )
    with no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])
    return model
