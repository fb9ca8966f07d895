"""The lists of the contexts, in a vocabulary wider than the type of their ranks."""

import numpy as np

from fastkd.cache.encoding.vocabulary import decode_lists, encode_lists, learn_lists, order_of, ranks_of


def test_lists_of_narrow_ranks_in_a_wide_vocabulary() -> None:
    tokens = np.zeros(20, np.int32)
    ids = np.tile(np.arange(100_000, 100_003, dtype=np.int32), (20, 1))
    counts = np.bincount(ids.ravel(), minlength=151_936)
    counts[:70_000] += 1000  # what is listed is rare elsewhere
    order = order_of(counts)
    lists = learn_lists(tokens, ids, None, counts)
    streams = encode_lists(lists, ranks_of(order))
    narrow = streams._replace(firsts=streams.firsts % 50_000, ties=streams.ties)
    narrow = narrow._replace(firsts=narrow.firsts.astype(np.uint16), ties=narrow.ties.astype(np.uint16))
    assert len(lists.ids) == 3
    assert np.array_equal(decode_lists(streams, lists.lengths, order), lists.ids)
    decoded = decode_lists(narrow, lists.lengths, order)
    assert np.array_equal(ranks_of(order)[decoded], ranks_of(order)[lists.ids] - streams.firsts[0] + narrow.firsts[0])
