"""Free text without credentials, for messages, logs and reports. Imports nothing heavy."""

import re

_SECRET = r"sig|signature|secret\w*|password|\w*token|\w*credentials?|access_?key\w*|sas_key|account_key|x-amz-[\w-]+"


def without_credentials(text: str) -> str:
    """Text whose URLs have no user:password@ and no query, which may be a signature; "…" stands for them."""
    return re.sub(r"(\w://[^\s?\"'<>]*)\?[^\s\"'<>]*", r"\1?…", re.sub(r"(\w://)[^/\s\"'<>]*@", r"\1…@", text))


def redact(text: str) -> str:
    """`without_credentials`, and values of names like password or token are replaced by "…", too."""
    text = without_credentials(text)
    return re.sub(rf"(?i)\b({_SECRET})(['\"]?\s*[=:]\s*['\"]?)(Bearer\s+|Basic\s+)?[^&\s\"',}}]+", r"\1\2…", text)
