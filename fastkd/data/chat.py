"""A conversation as token ids, with a loss mask."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..cache.errors import type_name

Messages = Sequence[Mapping[str, Any]]
Encode = Callable[[str], Sequence[int]]
Template = Callable[[list[dict[str, Any]], bool], str]
"""(messages, add_generation_prompt) to text, like `tokenizer.apply_chat_template(..., tokenize=False)`."""


ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "assistant", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
"""Role by the sender of a message of ShareGPT."""


class InvalidChat(ValueError):
    """A conversation that is malformed, or that its template cannot be used with."""


def chat_tokens(messages: Messages, template: Template, encode: Encode, loss_on: str) -> tuple[list[int], list[bool]]:
    """The token ids of a conversation and their loss mask, `[tokens]` both.

    loss_on="all": every position counts, and the text is tokenized in one go.
    loss_on="assistant": a position counts if the token that follows it belongs to an assistant message. An assistant
    message is what the template adds after the generation prompt, up to and including the end-of-turn mark. It is
    tokenized separately from the text before it, as in generation.

    encode: text to ids, without special tokens: the template writes them. Raises InvalidChat.
    """
    chat = [_message(message) for message in messages]
    if not chat:
        return [], []
    text = template(chat, False)
    if loss_on == "all":
        ids = list(encode(text))
        return ids, [True] * len(ids)
    ids, from_assistant, done = [], [], 0
    for number, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        before, after = template(chat[:number], True), template(chat[: number + 1], False)
        if not (len(before) >= done and after.startswith(before) and text.startswith(after)):
            raise InvalidChat(
                f"message {number}: the template changes its text if more messages follow, or does not place it after "
                'the generation prompt, so assistant messages cannot be located. Use loss_on="all".'
            )
        for part, is_reply in ((text[done : len(before)], False), (text[len(before) : len(after)], True)):
            tokens = encode(part)
            ids += tokens
            from_assistant += [is_reply] * len(tokens)
        done = len(after)
    rest = encode(text[done:]) if done < len(text) else []
    ids += rest
    from_assistant += [False] * len(rest)
    return ids, from_assistant[1:] + [False] * bool(from_assistant)


def _message(message: Any) -> dict[str, Any]:
    if isinstance(message, Mapping) and message.get("role") is None and "from" in message:
        return _from_sharegpt(message)
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidChat(f"got {type_name(message)} without a role; expected messages with role and content.")
    # an Arrow struct has every key in every message, null if JSON has none; templates test for a key's presence
    return {key: value for key, value in message.items() if value is not None}


def _from_sharegpt(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message {"from": ..., "value": ...} with role and content."""
    sender, value = message["from"], message.get("value")
    if sender not in ROLES or not isinstance(value, str):
        got = f"a message from {sender!r}" if isinstance(value, str) else f"{type(value).__name__} as its value"
        raise InvalidChat(f"got {got}; expected text, from one of {', '.join(ROLES)}.")
    return {"role": ROLES[sender], "content": value}
