"""Free text without credentials, for messages, logs and reports. Imports nothing heavy."""

import re

_SECRET = (
    r"sig|signature|\w*(?:secret|access_?key|api_?key)\w*|\w*passw(?:or)?d|\w*token|\w*credentials?|sas_key|account_key"
    r"|x-amz-[\w-]+"
)
# a quote inside a URL is followed by more of it
_CHARACTER = r"(?:[^\s\"'<>]|'(?=[\w%&=]))"
_USER = re.compile(rf"(\w://)(?:(?!/){_CHARACTER})*@")
_QUERY = re.compile(rf"(\w://(?:(?!\?){_CHARACTER})*)\?{_CHARACTER}*")


def without_credentials(text: str) -> str:
    """Text whose URLs have no user:password@ and no query, which may be a signature; "…" stands for them."""
    return _QUERY.sub(r"\1?…", _USER.sub(r"\1…@", text))


def redact(text: str) -> str:
    """`without_credentials`, and values of names like password or token are replaced by "…", too."""
    text = without_credentials(text)
    return re.sub(rf"(?i)\b({_SECRET})(['\"]?\s*[=:]\s*['\"]?)(Bearer\s+|Basic\s+)?[^&\s\"',}}]+", r"\1\2…", text)
