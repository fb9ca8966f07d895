"""The language of nested brackets: its teacher knows the exact distribution, and its words are valid."""

import torch

from fastkd.bench.rollouts_problem import ARMS, BEGIN, CLOSE, END, OPEN, VOCAB, Brackets, table


def test_words_are_valid_and_likely_to_the_teacher() -> None:
    language = Brackets()
    words = language.words(200, 0)
    assert sum(map(language.valid, words)) > 190  # a few are cut off
    assert words == language.words(200, 0) != language.words(200, 1)
    for word in filter(language.valid, words[:20]):
        logprobs = language(torch.tensor([word[:-1]]))[0]
        torch.testing.assert_close(logprobs.exp().sum(1), torch.ones(len(word) - 1))
        assert logprobs.gather(1, torch.tensor(word[1:])[:, None]).min() > -6


def test_the_teacher_goes_on_after_an_error() -> None:
    language = Brackets()
    right, wrong = ([BEGIN, OPEN, OPEN + 1, close, CLOSE] for close in (CLOSE + 1, CLOSE))
    assert language.valid([*right, END])
    assert not language.valid([*wrong, END])
    assert not language.valid(right)
    torch.testing.assert_close(language(torch.tensor([right]))[0, -1], language(torch.tensor([wrong]))[0, -1])
    assert language(torch.tensor([right]))[0, 2].argmax() == CLOSE + 1
    assert language(torch.tensor([[BEGIN]])).shape == (1, 1, VOCAB)


def test_arms_are_compared_with_the_same_divergence_on_data() -> None:
    one = {"valid": 0.5, "reverse_kl": 3.0, "tokens": 9.0, "seconds": 2.0}
    runs = [{"before": one, **{name: {**one, "valid": 0.5 + 0.1 * i} for i, name in enumerate(ARMS)}}] * 2
    lines = table(runs).splitlines()
    assert "| forward KL, half rollouts | 0.600 (+0.100 ± 0.000) | 3.000 (+0.000 ± 0.000) |" in lines[4]
    assert "(" not in lines[3]
