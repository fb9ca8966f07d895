"""A cache from the top-k log-probabilities (T = 1) of a server's API.

    python examples/import_server_logprobs.py build/from_server
    fastkd inspect build/from_server

The responses below are made up, in the form of an OpenAI-compatible server's chat completions. Request `logprobs` and
`top_logprobs`, and token ids instead of text (vLLM: `return_tokens_as_token_ids` and `return_token_ids`). The
log-probabilities must be the model's own: before temperature, top-p and penalties (vLLM: `--logprobs-mode
raw_logprobs`).

Only T = 1 is known, so `temperatures=(1.0,)`. The tail is the probability outside the list. Train on this cache with
T = 1: at any other temperature the tail is unknown.
"""

import sys

import numpy as np

from fastkd.cache import CacheSpec, create_cache

SPEC = CacheSpec(vocab_size=32_000, k=4, temperatures=(1.0,), teacher="made up", dataset="two questions")


def token(*top):  # one generated token: the candidates, best first
    return {"top_logprobs": [{"token": f"token_id:{i}", "logprob": x} for i, x in top]}


RESPONSES = [
    {
        "prompt_token_ids": [1, 529, 338],
        "choices": [{
            "token_ids": [278, 2],
            "logprobs": {"content": [
                token((278, -0.51), (263, -1.32), (385, -3.4), (599, -4.0)),
                token((2, 0.0), (29889, -17.2), (13, -18.0), (869, -9999.0)),
            ]},
        }],
    },
    {
        "prompt_token_ids": [1, 920],
        "choices": [{
            "token_ids": [2],
            "logprobs": {"content": [token((2, -0.1054), (13, -2.6), (29991, -4.2), (869, -4.9))]},
        }],
    },
]  # fmt: skip


def arrays(response, k):
    """One sequence: tokens, and the targets of its positions. Row i predicts the token after tokens[i]."""
    choice = response["choices"][0]
    prompt, content = response["prompt_token_ids"], choice["logprobs"]["content"]
    tokens = np.array(prompt + choice["token_ids"])
    ids = np.zeros((len(tokens), k), np.int32)
    logprobs = np.full((len(tokens), k), -np.inf, np.float32)  # unknown for the prompt, and after the end
    for row, position in enumerate(content, start=len(prompt) - 1):
        top = [t for t in position["top_logprobs"] if t["logprob"] > -9999]  # how servers write minus infinity
        for place, t in enumerate(sorted(top, key=lambda t: -t["logprob"])[:k]):
            ids[row, place], logprobs[row, place] = int(t["token"].removeprefix("token_id:")), t["logprob"]
    mass = np.exp(logprobs, dtype=np.float64).sum(1, keepdims=True)
    # By rounding the list may sum to 1 or more; the tail is then below float32's resolution of 1.
    return tokens, ids, logprobs, np.log1p(-np.minimum(mass, 1 - 2.0**-24))


def main(path):
    tokens, ids, logprobs, tail = zip(*(arrays(response, SPEC.k) for response in RESPONSES), strict=True)
    lengths = [len(t) for t in tokens]
    targets = {"ids": np.concatenate(ids), "logprobs": np.concatenate(logprobs), "tail": np.concatenate(tail)}
    with create_cache(path, SPEC) as writer:
        writer.write_shard(0, inputs={"tokens": np.concatenate(tokens)}, **targets, sequence_lengths=lengths)
        writer.seal()


if __name__ == "__main__":
    main(sys.argv[1])
