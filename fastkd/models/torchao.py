"""torchao, imported without what it logs: which compiled code of its does not load here, and deprecations of torch."""

import logging
import warnings
from typing import Any

INSTALL = "pip install 'fastkd[qat]'"
_NOISE = {"torchao": ("Failed to load", "Skipping import"), "torch.utils._pytree": ("register_constant",)}


def load_qat(error: type[Exception], what: str) -> Any:
    """The module torchao.quantization.qat. Raises `error`, naming what needs it, if it is not installed."""
    drop_noise()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchao.quantization.qat as qat
    except ImportError as missing:
        raise error(f"{what} needs torchao ({missing}). Use `{INSTALL}`.") from missing
    return qat


def drop_noise() -> None:
    """From now on, drop what is logged when torchao is imported, by whomever: transformers and peft import it where it
    is installed."""
    for name in _NOISE:
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _NOISE.get(record.name, ()))
