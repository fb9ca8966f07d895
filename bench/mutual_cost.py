"""What learning from each other costs: a step of several students together, against the steps of each alone on labels.

python -m fastkd.bench.mutual_cost [--layers 4] [--rows 4] [--length 128] [--rounds 5] [--every]

Thin copies of SmolLM2-135M with random weights (576 wide, 49,152 outcomes). Rounds alternate; times are CPU seconds of
one thread, so that other work on the machine hardly counts. Forward and backward; the optimizer's step is the same.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from fastkd.kernels import SparseTargets, TopKConfig
from fastkd.models.hub import load_transformers
from fastkd.settings import TrainSettings
from fastkd.stream.batch import MicroBatch
from fastkd.train.exchange import Exchange, everyone
from fastkd.train.objective import TokenKD
from fastkd.train.peers import Peers
from fastkd.train.student import LoadedStudent, Student, of_transformers


def thin(layers: int, seed: int) -> Student:
    """A copy of SmolLM2-135M with fewer layers and random weights."""
    transformers = load_transformers()
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(seed)
    return of_transformers(transformers.AutoModelForCausalLM.from_config(config), f"thin-{layers}")


def unanswered(rows: int, length: int, vocab: int) -> MicroBatch:
    """A micro-batch of random tokens, without targets."""
    tokens = torch.randint(vocab, (rows, length))
    labels = torch.cat([tokens[:, 1:], torch.full((rows, 1), -100)], 1)
    index = (labels.flatten() >= 0).nonzero()[:, 0]
    targets = replace(SparseTargets.empty(len(index), 0, vocab_size=vocab), index=index)
    return MicroBatch(
        labels=labels, sequences=torch.arange(rows, dtype=torch.int32), targets=targets, positions=rows * length,
        input_ids=tokens, position_ids=torch.arange(length).expand(rows, -1).contiguous(),
        cu_seqlens=torch.arange(0, rows * length + 1, length, dtype=torch.int32), max_seqlen=length, layout="padded",
    )  # fmt: skip


def peers_of(students: list[Student], config: TopKConfig, settings: TrainSettings, every: int = 0) -> Peers:
    names = [chr(ord("a") + i) for i in range(len(students))]
    made = {name: LoadedStudent(one, None) for name, one in zip(names, students, strict=True)}
    exchange = Exchange(everyone(names), config, every=every)
    if every:
        exchange.copy(dict(zip(names, students, strict=True)))
    peers = Peers(made, exchange)
    peers.read(TokenKD.from_settings(settings))
    return peers.train()


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (("layers", 4), ("rows", 4), ("length", 128), ("rounds", 5), ("students", 2), ("k", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--draws", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--every", action="store_true", help="also with copies (Codistillation)")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    students = [thin(asked.layers, seed) for seed in range(asked.students)]
    batch = unanswered(asked.rows, asked.length, students[0].vocab_size)
    settings = TrainSettings(temperature=asked.temperature)
    temperatures = tuple(sorted({1.0, asked.temperature}))
    config = TopKConfig(k=asked.k, draws=asked.draws, temperatures=temperatures)
    together = peers_of(students, config, settings)
    labels = TokenKD.from_settings(replace(settings, alpha=1.0))

    def alone() -> None:
        for one in students:
            one.read(labels)
            one(batch, num_items=batch.count)["loss"].backward()

    def learning(peers: Peers) -> Callable[[], Any]:
        def run() -> None:
            peers(batch, num_items=batch.count)["loss"].backward()

        return run

    def apart() -> None:
        """Targets and losses by the functions for one student: every LM head's logits twice."""
        given: dict[str, SparseTargets] = {}
        outputs = {name: one.run(batch) for name, one in together.students.items()}
        own = [together.live.targets_of(batch, output, together.vocab_size) for output in outputs.values()]
        for number, output in enumerate(outputs.values()):
            sources = together.live.pick(slice(0, batch.count), own, given)[number]
            for targets in sources:
                together._loss(batch, output, targets, batch.count, {}).loss.div(len(sources)).backward(
                    retain_graph=len(sources) > 1
                )

    ways: dict[str, Callable[[], Any]] = {"alone": alone, "together": learning(together), "apart": apart}
    if asked.every:
        ways["copies"] = learning(peers_of([thin(asked.layers, s) for s in range(asked.students)], config, settings, 4))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(asked.rounds + 1):
        for name, run in ways.items():
            begun = time.process_time()
            run()
            if number:  # the first warms up
                seconds[name].append(time.process_time() - begun)
            together.zero_grad(set_to_none=True)
    for name, times in seconds.items():
        ratios = [one / base for one, base in zip(times, seconds["alone"], strict=True)]
        print(
            f"{name:9} {median(times):7.3f} s, {median(ratios):.3f} of alone ({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
