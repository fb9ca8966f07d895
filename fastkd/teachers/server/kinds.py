"""Which kind a server is, and which model it serves."""

from typing import Any

from ...errors import TeacherError
from . import sglang, vllm
from .apis import Served, json_object
from .client import BadAnswer, ServerClient
from .options import ServerOptions

KINDS: dict[str, Any] = {"vllm": vllm, "sglang": sglang}
"""By the `owned_by` of their models."""


def find_api(client: ServerClient, options: ServerOptions) -> tuple[Any, Served]:
    """Which kind of server this is, and what it says. TeacherError if it is none that is known, serves several models
    of which none was named, or does not serve the one that was."""
    models = client.ask("/v1/models", lambda body: _models(client, body))
    names = [str(model.get("id")) for model in models]
    if options.model is None and len(models) != 1:
        raise TeacherError(
            f"{client.shown}: got a server of {len(models)} models ({', '.join(names[:6])}); expected the name of one: "
            "--teacher-options model=NAME."
        )
    if options.model is not None and options.model not in names:
        raise TeacherError(
            f"{client.shown}: got a server of {', '.join(names[:6]) or 'no model'}; expected {options.model}. "
            "Start it with that model, or name one that it serves."
        )
    model = models[0 if options.model is None else names.index(options.model)]
    kind = options.api or str(model.get("owned_by", "")).lower()
    if kind not in KINDS:
        raise TeacherError(
            f"{client.shown}: got a server of {kind or 'an unknown kind'}; expected vLLM or SGLang, which return the "
            "log-probabilities of prompts. If it is one of them behind a proxy, use --teacher-options api=vllm."
        )
    return KINDS[kind], KINDS[kind].describe(client, model)


def _models(client: ServerClient, body: bytes) -> list[dict[str, Any]]:
    try:
        found = json_object(body).get("data")
    except BadAnswer:
        found = None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        start = " ".join(body[:40].decode("utf-8", "replace").split())
        raise TeacherError(
            f"{client.shown}: /v1/models answered with {start!r}…; expected a list of models, as a server of vLLM or "
            "SGLang has it. Check host and port."
        )
    return found
