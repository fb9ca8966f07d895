"""A conversation as tokens, and which of its positions count."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Messages = Sequence[Mapping[str, Any]]
Tokenizer = Callable[[str], Sequence[int]]
Template = Callable[[list[dict[str, Any]], bool], str]
"""(messages, add_generation_prompt) to text, as `tokenizer.apply_chat_template(..., tokenize=False)` makes it."""


class NotChat(ValueError):
    """What a conversation, or the template with it, lacks."""


def chat_tokens(
    messages: Messages, template: Template, tokenizer: Tokenizer, loss_on: str
) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and for each position whether it counts: `[tokens]` both.

    loss_on="all": every position counts, and the text is tokenised whole.
    loss_on="assistant": a position counts if the token it predicts, the next one, is the assistant's. A reply is what
    the template adds after its generation prompt, to the end of the message (the end-of-turn mark included); it is
    tokenised apart from what is before it, as it is when a model generates it.

    The tokenizer must not add special tokens: they are in the template's text. Raises NotChat.
    """
    chat = [_message(message) for message in messages]
    if not chat:
        return [], []
    text = template(chat, False)
    if loss_on == "all":
        ids = list(tokenizer(text))
        return ids, [True] * len(ids)
    ids, theirs, done = [], [], 0
    for number, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        before, after = template(chat[:number], True), template(chat[: number + 1], False)
        if not (len(before) >= done and after.startswith(before) and text.startswith(after)):
            raise NotChat(
                f"message {number}: the template writes it otherwise once more messages follow, or puts it elsewhere "
                'than after its generation prompt, so that replies cannot be told apart. Use loss_on="all".'
            )
        for part, reply in ((text[done : len(before)], False), (text[len(before) : len(after)], True)):
            tokens = tokenizer(part)
            ids += tokens
            theirs += [reply] * len(tokens)
        done = len(after)
    rest = tokenizer(text[done:]) if done < len(text) else []
    ids += rest
    theirs += [False] * len(rest)
    return ids, theirs[1:] + [False] * bool(theirs)


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise NotChat(f"got {type(message).__name__} without a role; expected messages with role and content.")
    # A column of structs has every key in every message, null where JSON has none; templates ask whether one is there.
    return {key: value for key, value in message.items() if value is not None}
