"""max_ngram_counts: how often the most frequent run of n tokens occurs, against counting tuples."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spear_kernels.repetition import max_ngram_counts, max_ngram_counts_reference
from spear_kernels.testing import OperationRecorder

NUM_SEQS = 4
ROWS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, NUM_SEQS - 1), st.integers(-1, 1), st.booleans()), max_size=60
)
VOCABULARIES = st.sampled_from(
    [(0, 1, 2), (151_000, 5, 17), (-(2**63), 2**63 - 1, 0), (2**62, -(2**62), 1), (2**40, 2**41, 2**42)]
)


def columns(rows, vocabulary=(0, 1, 2)):
    tokens, sequences, messages, mask = zip(*rows, strict=True) if rows else ((), (), (), ())
    ids = torch.tensor([vocabulary[token] for token in tokens], dtype=torch.int64)
    return (
        ids,
        *(torch.tensor(column, dtype=torch.int64) for column in (sequences, messages)),
        torch.tensor(mask).bool(),
    )


def both(rows, n, enough=1, vocabulary=(0, 1, 2), by_sequence=False):
    """Counts and their definition; message ids change in about every second row, so runs are short."""
    rows = sorted(rows, key=lambda row: row[1]) if by_sequence else rows
    ids, sequences, messages, mask = columns(rows, vocabulary)
    given_too = {"num_seqs": NUM_SEQS, "message_ids": messages, "mask": mask}
    expected = max_ngram_counts_reference(ids, sequences, n, **given_too)
    counts = max_ngram_counts(ids, sequences, n, enough=enough, **given_too)
    assert counts.dtype == torch.int64 and counts.shape == (NUM_SEQS,)
    return counts.tolist(), [count if count >= enough else 0 for count in expected.tolist()]


@settings(max_examples=150)
@given(ROWS, st.integers(1, 4), st.integers(1, 4), VOCABULARIES, st.booleans())
def test_counts_within_messages_of_interleaved_sequences(rows, n, enough, vocabulary, by_sequence):
    counts, expected = both(rows, n, enough, vocabulary, by_sequence)
    assert counts == expected


PIECES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 14), st.integers(0, 2), st.booleans()), min_size=1, max_size=14
)
"""Stretches of a sequence: a phrase's number, tokens taken from it, the sequence, and whether it opens a message."""


def text(pieces, phrase_length):
    tokens, sequences, messages = [], [], []
    for message, (phrase, length, sequence, opens) in enumerate(pieces):
        tokens += [(phrase * 7 + place % phrase_length) % 11 for place in range(length)]
        sequences += [sequence] * length
        messages += [message if opens or not messages else messages[-1]] * length
    return (torch.tensor(column) for column in (tokens, sequences, messages))


@settings(max_examples=150)
@given(
    PIECES,
    st.integers(1, 5),
    st.sampled_from([5, 6, 7, 13, 20, 33]),
    st.integers(1, 5),
    st.sampled_from([1, 2**20]),
    st.sampled_from([2**63, 2**16]),
)
def test_counts_of_long_runs_in_repetitive_text(pieces, phrase_length, n, enough, scale, keys):
    """Wide ids and narrow keys (2**16 has room for two names of 196 tokens) take several rounds."""
    ids, sequences, messages = text(pieces, phrase_length)
    expected = max_ngram_counts_reference(ids, sequences, n, num_seqs=3, message_ids=messages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["spear_kernels.repetition.op"], "KEYS", keys)
        counts = max_ngram_counts(ids * scale, sequences, n, num_seqs=3, message_ids=messages, enough=enough)
    assert torch.equal(counts, torch.where(expected >= enough, expected, 0))


@pytest.fixture
def device_path(monkeypatch):
    """The branch of tensors whose values the host must not read, on the CPU."""
    monkeypatch.setattr(sys.modules["spear_kernels.repetition.op"], "host_may_wait", lambda tensor: False)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 13, 20])
def test_without_reading_values_the_counts_are_the_same_and_nothing_waits(device_path, n):
    generator = torch.Generator().manual_seed(n)
    for _ in range(20):
        pieces = torch.randint(1, 14, (8, 4), generator=generator).remainder(torch.tensor([4, 14, 3, 2])).tolist()
        ids, sequences, messages = text(pieces, 3)
        mask = torch.rand(len(ids), generator=generator) > 0.02
        given_too = {"num_seqs": 3, "message_ids": messages, "mask": mask}
        with OperationRecorder() as seen:
            counts = max_ngram_counts(ids, sequences, n, **given_too)
        assert not seen.host_syncs
        assert torch.equal(counts, max_ngram_counts_reference(ids, sequences, n, **given_too))


@pytest.mark.parametrize("bits", [21, 22, 32, 42, 43, 44, 62, 63])
@pytest.mark.parametrize("num_seqs", [1, 2**20])
def test_keys_of_many_sequences_and_large_ids_do_not_overflow(bits, num_seqs):
    """Keys have 63 bits for the sequence and as many tokens as fit: three, two, one, or names in their place."""
    largest = 2**bits - 1
    ids = torch.tensor([largest, 0] * 3 + [largest - 1] * 4)
    last = torch.where(ids < 0, 0, num_seqs - 1)
    assert max_ngram_counts(ids, last, 2, num_seqs=num_seqs)[-1] == 3
    assert max_ngram_counts(ids, last, 3, num_seqs=num_seqs)[-1] == 2
    assert max_ngram_counts(ids[:6], last[:6], 4, num_seqs=num_seqs)[-1] == 2


@pytest.mark.parametrize("num_tokens", range(12))
def test_sequences_shorter_than_the_run(num_tokens):
    ids = torch.arange(num_tokens)
    assert max_ngram_counts(ids, torch.zeros_like(ids), 8, num_seqs=1).tolist() == [int(num_tokens >= 8)]


def test_one_token_repeated():
    ids, sequences = torch.full((300,), 7), torch.tensor([0] * 100 + [2] * 200)
    assert max_ngram_counts(ids, sequences, num_seqs=3).tolist() == [81, 0, 181]
    assert max_ngram_counts(ids, sequences, 1, num_seqs=3).tolist() == [100, 0, 200]
    assert max_ngram_counts(ids, sequences, num_seqs=3, enough=82).tolist() == [0, 0, 181]


def test_runs_do_not_straddle_equal_messages_with_a_masked_token_between():
    ids, mask = torch.ones(7, dtype=torch.int64), torch.tensor([1, 1, 1, 0, 1, 1, 1]).bool()
    assert max_ngram_counts(ids, torch.zeros_like(ids), 3, num_seqs=1, mask=mask).tolist() == [2]
    assert max_ngram_counts(ids, torch.zeros_like(ids), 4, num_seqs=1, mask=mask).tolist() == [0]


def test_equal_runs_of_other_sequences_are_not_added():
    ids = torch.arange(5).repeat(3)
    assert max_ngram_counts(ids, torch.arange(3).repeat_interleave(5), 5, num_seqs=3).tolist() == [1, 1, 1]


def test_empty_batch():
    nothing = torch.zeros(0, dtype=torch.int64)
    assert max_ngram_counts(nothing, nothing, num_seqs=2).tolist() == [0, 0]
    assert max_ngram_counts(nothing, nothing, num_seqs=0).tolist() == []


def test_small_integers_are_widened():
    ids = torch.tensor([1, 2, 1, 2, 1], dtype=torch.int32)
    assert max_ngram_counts(ids, torch.zeros_like(ids), 2, num_seqs=1).tolist() == [2]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n": 0}, "n=0"),
        ({"enough": 0}, "enough=0"),
        ({"num_seqs": 2}, "seq_ids reach from 0 to 2"),
        ({"seq_ids": torch.tensor([-1, 0, 0])}, "seq_ids reach from -1"),
        ({"seq_ids": torch.zeros(2, dtype=torch.int64)}, "seq_ids"),
        ({"message_ids": torch.zeros(2, dtype=torch.int64)}, "message_ids"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, "mask"),
    ],
)
def test_bad_arguments_are_named(changes, named):
    arguments = {"token_ids": torch.zeros(3, dtype=torch.int64), "seq_ids": torch.arange(3), "num_seqs": 3, **changes}
    with pytest.raises(ValueError, match=named):
        max_ngram_counts(**arguments)
