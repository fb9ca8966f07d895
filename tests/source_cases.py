"""`BatchSourceTests`, the tests that every `BatchSource` must pass, and a source of a few synthetic batches."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from stream_cases import bits

from fastkd import MicroBatch, Step
from fastkd.errors import StreamError
from fastkd.kernels import SparseTargets
from fastkd.stream import BatchSource


class ToySource:
    """Steps of one micro-batch of random tokens, each a function of (seed, epoch, number); the teacher is a table."""

    def __init__(self, *, vocab: int = 20, seed: int = 0, steps: int = 4) -> None:
        self.fingerprint = {"toy": seed, "vocab": vocab, "steps": steps}
        self._vocab, self._seed, self._count = vocab, seed, steps
        self._teacher = 2 * torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed))
        self._position = (0, 0)
        self._active: object = None

    def __len__(self) -> int:
        return self._count

    def steps(self) -> Iterator[Step]:
        active = self._active = object()
        while self._active is active:
            epoch, number = self._position
            if number == self._count:
                epoch, number = epoch + 1, 0
            self._position = epoch, number + 1
            yield self._step(epoch, number)

    def state_dict(self) -> dict[str, Any]:
        return {"position": list(self._position), "fingerprint": self.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("fingerprint") != self.fingerprint:
            raise StreamError(f"state: got {state.get('fingerprint')}; expected {self.fingerprint}.")
        self.seek(*state["position"])

    def seek(self, epoch: int, step: int) -> None:
        if step > self._count:
            raise StreamError(f"step: got {step}; expected at most {self._count}.")
        self.close()
        self._position = epoch, step

    def close(self) -> None:
        self._active = None

    def _step(self, epoch: int, number: int) -> Step:
        rows, length = 3, 5
        generator = torch.Generator().manual_seed(10**6 * self._seed + 1000 * epoch + number)
        tokens = torch.randint(self._vocab, (rows, length), generator=generator)
        labels = torch.cat([tokens[:, 1:], torch.full((rows, 1), -100)], 1)
        index = (labels.flatten() >= 0).nonzero()[:, 0]
        targets = SparseTargets.from_logits(self._teacher[tokens.flatten()[index]], k=4)
        batch = MicroBatch(
            input_ids=tokens,
            labels=labels,
            position_ids=torch.arange(length).expand(rows, length),
            cu_seqlens=torch.arange(0, (rows + 1) * length, length, dtype=torch.int32),
            sequences=torch.arange(rows, dtype=torch.int32),
            targets=replace(targets, index=index),
            max_seqlen=length,
            positions=rows * length,
            layout="padded",
        )
        return Step([batch], batch.count, batch.positions, rows, epoch, number)


def take(source: BatchSource, count: int) -> list[Step]:
    """The next steps."""
    steps = source.steps()
    found = [next(steps) for _ in range(count)]
    source.close()
    return found


class BatchSourceTests:
    """Inherit from it, and implement `source` (a new one at each call, always the same) and `other`."""

    def source(self) -> BatchSource:
        """The source that is tested, at the start of epoch 0."""
        raise NotImplementedError

    def other(self) -> BatchSource:
        """A source with another fingerprint."""
        raise NotImplementedError

    def test_it_is_a_batch_source(self) -> None:
        source = self.source()
        assert isinstance(source, BatchSource)
        assert len(source) > 1
        for value in (source.fingerprint, source.state_dict()):
            assert json.loads(json.dumps(value, allow_nan=False)) == value

    def test_steps_go_through_epochs(self) -> None:
        source = self.source()
        n = len(source)
        found = take(source, 2 * n + 1)
        expected = [(epoch, number) for epoch in range(3) for number in range(n)]
        assert [(step.epoch, step.number) for step in found] == expected[: 2 * n + 1]
        for step in found:
            assert 0 < step.count == sum(batch.count for batch in step.micro_batches)
            assert step.positions == sum(batch.positions for batch in step.micro_batches)
        assert [bits(step) for step in take(self.source(), 2 * n + 1)] == [bits(step) for step in found]
        assert bits(found[0])[5:] != bits(found[n])[5:], "epochs have different batches"

    def test_it_resumes_and_seeks_to_every_step(self) -> None:
        source = self.source()
        n = len(source)
        states, whole = [source.state_dict()], []
        for step in source.steps():
            whole.append(bits(step))
            states.append(source.state_dict())
            if len(whole) == 2 * n:
                break
        source.close()
        used = self.source()
        for at, state in enumerate(states[:-1]):
            resumed, sought = self.source(), self.source()
            resumed.load_state_dict(json.loads(json.dumps(state)))
            sought.seek(*divmod(at, n))
            used.seek(*divmod(at, n))
            rest = whole[at : at + 2]
            for one in (resumed, sought, used):
                assert [bits(step) for step in take(one, len(rest))] == rest
        # the end of an epoch is a position of its own, from which the next epoch follows
        for at in (n, 2 * n):
            sought.seek(at // n - 1, n)
            assert sought.state_dict() == states[at]
        sought.seek(0, n)
        assert bits(take(sought, 1)[0]) == whole[n]
        for at in range(n):
            sought.seek(0, at)
            assert at == 0 or sought.state_dict() == states[at]
        with pytest.raises(StreamError, match="step: got"):
            sought.seek(0, n + 1)

    def test_one_iterator_at_a_time(self) -> None:
        source = self.source()
        first = source.steps()
        next(first)
        second = bits(next(source.steps()))
        assert second == bits(take(self.source(), 2)[1])
        assert list(first) == []

    def test_closing_keeps_the_position(self) -> None:
        source = self.source()
        steps = source.steps()
        next(steps)
        state = source.state_dict()
        source.close()
        assert list(steps) == []
        assert source.state_dict() == state
        source.close()
        assert bits(take(source, 1)[0]) == bits(take(self.source(), 2)[1])

    def test_states_of_other_sources_are_refused(self) -> None:
        with pytest.raises(StreamError, match="state"):
            self.source().load_state_dict(self.other().state_dict())
