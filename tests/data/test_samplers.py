from __future__ import annotations

import numpy as np
import pytest

from efficientllava.data.datamodule import GroupedBatches

LENGTHS = np.array([(1 + 7 * i % 90) * (-1 if i % 5 == 0 else 1) for i in range(200)])  # every fifth is text-only


def shards(world: int, batch: int, group: int, epoch: int = 0, seed: int = 0) -> list[list[list[int]]]:
    result = []
    for rank in range(world):
        sampler = GroupedBatches(LENGTHS, batch, group, seed, rank, world)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        result.append(batches)
    return result


@pytest.mark.parametrize(("world", "batch", "group"), [(1, 4, 32), (2, 4, 32), (3, 2, 0), (2, 64, 128)])
def test_no_batch_mixes_images_and_text(world: int, batch: int, group: int) -> None:
    ranks = shards(world, batch, group)
    assert {index for rank in ranks for one in rank for index in one} == set(range(len(LENGTHS)))
    assert {len(one) for rank in ranks for one in rank} == {batch}
    assert len({len(rank) for rank in ranks}) == 1
    kinds = [{bool(LENGTHS[index] > 0) for rank in ranks for index in rank[step]} for step in range(len(ranks[0]))]
    assert {len(kind) for kind in kinds} == {1}
    # Nothing is repeated but what fills up the last round of a kind.
    assert sum(len(one) for rank in ranks for one in rank) - len(LENGTHS) < 2 * world * batch


def test_an_optimiser_step_is_one_group_sorted_by_length() -> None:
    first, second = shards(2, 4, 32)
    steps = [first[i : i + 4] + second[i : i + 4] for i in range(0, 4 * 6, 4)]
    assert {len({index for one in step for index in one}) for step in steps} == {32}
    for i in range(0, 4 * 6, 4):
        longest = [max(abs(LENGTHS[index]) for index in one) for one in first[i : i + 4]]
        assert longest == sorted(longest, reverse=True)
    for one, other in zip(first[:24], second[:24], strict=True):
        assert abs(np.abs(LENGTHS[one]).mean() - np.abs(LENGTHS[other]).mean()) < 8
    spread = [np.abs(LENGTHS[one]).max() - np.abs(LENGTHS[one]).min() for one in first]
    assert np.mean(spread) < 30  # of 90


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    assert shards(2, 4, 32) == shards(2, 4, 32)
    assert shards(2, 4, 32) != shards(2, 4, 32, epoch=1)
    assert shards(2, 4, 32) != shards(2, 4, 32, seed=1)
    kinds = [LENGTHS[batch[0]] > 0 for batch in shards(1, 4, 32)[0]]
    assert kinds != sorted(kinds)  # text comes between images


def test_data_of_one_kind() -> None:
    sampler = GroupedBatches(np.abs(LENGTHS), 8, 0)
    assert sorted(index for batch in sampler for index in batch) == list(range(200))
