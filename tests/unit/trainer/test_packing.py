"""Packing: every scored token predicted exactly once, from the right row, at the right position, under the budget."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oapl_engine.samples import Group, Prompt, Rollout
from oapl_engine.trainer.packing import TrainGroup, pack


@st.composite
def random_items(draw):
    items = []
    for g in range(draw(st.integers(1, 5))):
        prompt = np.array(draw(st.lists(st.integers(0, 50), min_size=1, max_size=20)))
        rollouts = []
        for i in range(draw(st.integers(1, 5))):
            mask = draw(st.lists(st.integers(0, 1), min_size=1, max_size=20).filter(any))
            response = np.array(draw(st.lists(st.integers(0, 50), min_size=len(mask), max_size=len(mask))))
            rollouts.append(rollout(f"0.{g}.0.{i}", prompt, response, mask))
        items.append(TrainGroup(tuple(rollouts), np.arange(len(rollouts), dtype=np.float32) + 10 * g))
    return items


def rollout(key, prompt, response, mask):
    tokens = np.concatenate([prompt, response]).astype(np.int32)
    full = np.concatenate([np.zeros(len(prompt)), mask]).astype(np.uint8)
    behavior = np.where(full, -np.arange(1, len(tokens) + 1), 0).astype(np.float32)
    return Rollout(key, "p", key[:-2], 0, "t", tokens, len(prompt), full, behavior, (), "stop", "scored", 0.0)


def sequences(batch):
    """key -> (row indices it may read, in order; its scored rows): the layout as attention sees it."""
    read = {}
    keys = iter(range(len(batch.keys)))
    for span in batch.prompts:
        prefix = list(range(span.start, span.start + span.length))
        for start, rows in span.responses:
            i = next(keys)
            scored = batch.rows[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]]
            read[batch.keys[i]] = (prefix + list(range(start, start + rows)), scored, batch.advantage[i])
    return read


@settings(max_examples=150, deadline=None)
@given(random_items(), st.integers(1, 120), st.booleans())
def test_round_trip(items, budget, share):
    """Reading each sequence's rows gives back its tokens, targets, positions, behaviour log-probs and advantage."""
    batches = pack(items, budget, share)
    seen = [key for batch in batches for key in batch.keys]
    assert sorted(seen) == sorted(r.key for item in items for r in item.rollouts)
    read = {key: (batch, *value) for batch in batches for key, value in sequences(batch).items()}
    for item in items:
        for r, advantage in zip(item.rollouts, item.advantage, strict=True):
            batch, rows, scored, found = read[r.key]
            np.testing.assert_array_equal(batch.token_ids[rows], r.token_ids[: len(rows)])
            np.testing.assert_array_equal(batch.positions[rows], np.arange(len(rows)))
            np.testing.assert_array_equal(batch.target[scored], r.token_ids[r.loss_mask != 0])
            np.testing.assert_array_equal(batch.positions[scored] + 1, np.flatnonzero(r.loss_mask))
            np.testing.assert_array_equal(batch.behavior_logprob[scored], r.behavior_logprob[r.loss_mask != 0])
            assert set(scored) <= set(rows)
            assert found == advantage


@settings(max_examples=150, deadline=None)
@given(random_items(), st.integers(1, 120), st.booleans())
def test_budget_and_rows(items, budget, share):
    """A batch over the budget holds one response; rows are without gaps; only scored rows have targets."""
    for batch in pack(items, budget, share):
        assert len(batch.token_ids) <= budget or len(batch.keys) == 1
        ends = [batch.prompts[0].start]
        for span in batch.prompts:
            ends.append(span.start + span.length)
            for start, rows in span.responses:
                assert start == ends[-1]
                ends.append(start + rows)
        assert ends[0] == 0
        assert ends[-1] == len(batch.token_ids)
        np.testing.assert_array_equal(np.flatnonzero(batch.target != -100), batch.rows)
        assert len(np.unique(batch.rows)) == len(batch.rows) == batch.cu_seqlens[-1]
        assert len(batch.cu_seqlens) == len(batch.keys) + 1


@settings(max_examples=50, deadline=None)
@given(random_items(), st.integers(20, 120))
def test_same_input_same_batches(items, budget):
    first, second = pack(items, budget, True), pack(items, budget, True)
    assert [b.keys for b in first] == [b.keys for b in second]
    assert all(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(first, second, strict=True))


def test_prompt_once(groups):
    """8 responses of 10 tokens to a prompt of 100: 99 + 8 * 10 rows shared, 8 * 109 unshared."""
    items = groups.items([groups.make(0, 100, [10] * 8)])
    assert [len(b.token_ids) for b in pack(items, 10_000, True)] == [99 + 80]
    assert [len(b.token_ids) for b in pack(items, 10_000, False)] == [8 * 109]


def test_balance(groups):
    """64 unequal groups in micro-batches of 2,000 rows: the lightest carries at least 90 % of the heaviest."""
    rng = np.random.default_rng(0)
    items = groups.items([groups.make(i, 30, rng.integers(5, 100, 4)) for i in range(64)])
    loads = [len(b.token_ids) for b in pack(items, 2000, True)]
    assert max(loads) <= 2000
    assert min(loads) >= 0.9 * max(loads)


def test_refusals(groups):
    one, other = groups.make(0, 5, [4, 4]), groups.make(1, 5, [4, 4])
    mixed = Group("0.p0.0", Prompt("p0", one.prompt.token_ids, "t"), (one.rollouts[0], other.rollouts[0]), 0)
    with pytest.raises(ValueError, match=r"0\.p0\.0\.0 and 0\.p1\.0\.0 are one group but their prompts differ"):
        pack(groups.items([mixed]), 100, True)
    unscored = dataclasses.replace(one.rollouts[0], loss_mask=np.zeros_like(one.rollouts[0].loss_mask))
    with pytest.raises(ValueError, match=r"0\.p0\.0\.0 has no scored token"):
        pack([TrainGroup((unscored,), np.zeros(1, np.float32))], 100, True)
