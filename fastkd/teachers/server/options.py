"""Options of a server as a teacher."""

import os
import re
from dataclasses import dataclass

from ...errors import TeacherError

_NAME = re.compile(r"[A-Za-z_]\w{0,63}")
APIS = ("vllm", "sglang")


@dataclass(frozen=True)
class ServerOptions:
    """How a server is asked.

    model: the name that it serves the model under; None: the only one. api: "vllm" or "sglang"; None: as it says.
    vocab_size: the width of its logits; None: as it says. concurrency: requests at a time. timeout: seconds for a
    request. retries: further tries of a request that failed, with pauses of up to a minute.
    token_env: the environment variable that has the bearer token; None: no token is sent.
    """

    model: str | None = None
    api: str | None = None
    vocab_size: int | None = None
    concurrency: int = 32
    timeout: float = 600.0
    retries: int = 8
    token_env: str | None = None

    def __post_init__(self) -> None:
        if self.api not in (None, *APIS):
            raise TeacherError(f"api: got {self.api!r}; expected one of {', '.join(APIS)}.")
        for name, least in (("vocab_size", 1), ("concurrency", 1), ("timeout", 0.001), ("retries", 0)):
            value = getattr(self, name)
            if value is not None and not least <= value < 2**31:
                raise TeacherError(f"{name}: got {value}; expected a number from {least:g} on.")

    def token(self) -> str:
        """The bearer token; "" if there is none. TeacherError if the environment lacks it."""
        if self.token_env is None:
            return ""
        if not (token := os.environ.get(self.token_env, "").strip()):
            # what is no name may be the token itself
            shown = self.token_env if _NAME.fullmatch(self.token_env) and self.token_env.isupper() else "a text"
            raise TeacherError(
                f"token_env: got {shown}, and the environment has no such variable, or an empty one; expected the name "
                "of the variable that holds the token. Set it, and give its name."
            )
        return token
