"""A model's folder uploaded to the Hugging Face Hub: checked before hours of training, done after them.

The token is huggingface_hub's: HF_TOKEN, or what `hf auth login` stored. It is in no message.
"""

import json
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..cache.errors import said
from ..errors import TrainError
from .hub import INSTALL, brief

LOGIN = "Log in with a token that may write (`hf auth login`, or HF_TOKEN)"


class Upload(NamedTuple):
    """Where to upload to. repo: OWNER/NAME. private: whether a new repository is."""

    repo: str
    private: bool = False

    def command(self, folder: Path) -> str:
        """The command that uploads a folder by hand."""
        return shlex.join(["hf", "upload", self.repo, str(folder), *(["--private"] if self.private else [])])


def check_upload(repo: str, *, private: bool = False) -> Upload:
    """The repository OWNER/NAME that a folder can be uploaded to, by what the Hub says of the token's owner.

    repo: OWNER/NAME, or NAME for one of the token's owner. Raises TrainError for a name that is none, without a token
    or with one that may not write there, and if the Hub does not answer.
    """
    hub = _hub()
    try:
        hub.utils.validate_repo_id(repo)
    except hub.errors.HFValidationError as error:
        raise TrainError(f"push: got {repo!r}; expected OWNER/NAME ({brief(error)})") from error
    if hub.constants.HF_HUB_OFFLINE:
        raise TrainError("push: HF_HUB_OFFLINE forbids uploads. Unset it, or leave --push out and upload later.")
    if hub.get_token() is None:
        raise TrainError(f"push: got no token for the Hugging Face Hub. {LOGIN}.")
    try:
        owner = hub.HfApi().whoami()
    except Exception as error:
        raise TrainError(f"push: {_refusal(hub, error)}") from error
    name = str(owner.get("name", ""))
    role = ((owner.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise TrainError(f"push: got a token of {name} that may only read. {LOGIN}.")
    namespace, _, own = repo.rpartition("/")
    groups = [str(group.get("name", "")) for group in owner.get("orgs") or ()]
    if namespace and namespace not in (name, *groups):
        known = ", ".join((name, *groups))
        raise TrainError(f"push: got {repo!r} with a token of {name}; expected a repository of {known}.")
    return Upload(f"{namespace or name}/{own}", private)


def check_base(source: Any, *, adapter: bool) -> None:
    """Raise TrainError for a student that is an adapter of a folder: others cannot load it, and its config names that
    place. source: of the student. adapter: whether it gets a new one."""
    if not isinstance(source, (str, Path)) or not Path(source).is_dir():
        return
    base, config = str(source) if adapter else None, Path(source) / "adapter_config.json"
    if config.exists():
        with suppress(ValueError, AttributeError):  # it is refused when it is loaded
            base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if base is not None and Path(base).exists():
        raise TrainError(
            f"push: got an adapter of the folder {base}; expected a base that is named by its id on the Hub, which "
            "others can load. Name it so, or leave --push out and upload the merged student (--lora-merge) later."
        )


def upload(target: Upload, folder: Path, *, quiet: bool) -> str:
    """Upload a folder in one commit; the repository is created unless it exists. Returns its URL. quiet: without
    progress bars. Raises TrainError, with the command that uploads it later."""
    hub = _hub()
    bars = not hub.utils.are_progress_bars_disabled()
    if quiet and bars:
        hub.utils.disable_progress_bars()
    try:
        api = hub.HfApi()
        url = api.create_repo(target.repo, private=target.private or None, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Upload a student trained by fastkd")
        return str(url)
    except Exception as error:
        raise TrainError(
            f"push: {_refusal(hub, error)} The student is complete in {folder}. To upload it later: "
            f"{target.command(folder)}"
        ) from error
    finally:
        if quiet and bars:
            hub.utils.enable_progress_bars()


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise TrainError(f"push: {said(error)}. Use `{INSTALL}`.") from error
    return huggingface_hub


def _refusal(hub: Any, error: Exception) -> str:
    """Why the Hub was not reached, or refused; in sentences, without the token."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"the Hugging Face Hub does not accept the token (401). {LOGIN}."
    if status == 403:
        return f"the token may not write there (403). {LOGIN}, for that repository."
    text, token = brief(error), hub.get_token()
    text = text.replace(token, "…") if token else text
    if status is not None:
        return f"the Hugging Face Hub refused it ({status}; {text})."
    return f"the Hugging Face Hub gave no answer ({text})."
