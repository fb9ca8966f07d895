"""A cache from what a server's API says: top-k log-probabilities at T = 1, and nothing else.

    python examples/import_server_logprobs.py build/from_server
    fastkd inspect build/from_server

The responses below are made up, in the shape in which OpenAI-compatible servers answer a chat completion. Ask for
`logprobs` and `top_logprobs`, and for token ids instead of text (vLLM: `return_tokens_as_token_ids` and
`return_token_ids`). The numbers have to be those of the model itself: not after a temperature, top-p or penalties
(vLLM: `--logprobs-mode raw_logprobs`).

Only T = 1 is known, so `temperatures=(1.0,)`. The tail is the mass that the list leaves out; losses on this cache are
to be taken at T = 1, for at any other temperature nobody knows the tail.
"""

import sys

import numpy as np

from fastkd.cache import CacheSpec, create_cache

SPEC = CacheSpec(vocab_size=32_000, k=4, temperatures=(1.0,), teacher="made up", dataset="two questions")


def said(*top):  # one generated token: the candidates, best first
    return {"top_logprobs": [{"token": f"token_id:{i}", "logprob": x} for i, x in top]}


RESPONSES = [
    {
        "prompt_token_ids": [1, 529, 338],
        "choices": [{
            "token_ids": [278, 2],
            "logprobs": {"content": [
                said((278, -0.51), (263, -1.32), (385, -3.4), (599, -4.0)),
                said((2, 0.0), (29889, -17.2), (13, -18.0), (869, -9999.0)),
            ]},
        }],
    },
    {
        "prompt_token_ids": [1, 920],
        "choices": [{
            "token_ids": [2],
            "logprobs": {"content": [said((2, -0.1054), (13, -2.6), (29991, -4.2), (869, -4.9))]},
        }],
    },
]  # fmt: skip


def arrays(response, k):
    """One sequence: tokens, and the targets of its positions. Row i is what comes after tokens[i]."""
    choice = response["choices"][0]
    prompt, content = response["prompt_token_ids"], choice["logprobs"]["content"]
    tokens = np.array(prompt + choice["token_ids"])
    ids = np.zeros((len(tokens), k), np.int32)
    logprobs = np.full((len(tokens), k), -np.inf, np.float32)  # of the prompt, and after the end, nothing is known
    for row, position in enumerate(content, start=len(prompt) - 1):
        top = [t for t in position["top_logprobs"] if t["logprob"] > -9999]  # how servers write minus infinity
        for place, t in enumerate(sorted(top, key=lambda t: -t["logprob"])[:k]):
            ids[row, place], logprobs[row, place] = int(t["token"].removeprefix("token_id:")), t["logprob"]
    mass = np.exp(logprobs, dtype=np.float64).sum(1, keepdims=True)
    # The list may sum to 1 and more by rounding; what is left is then less than float32 can tell from nothing.
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
