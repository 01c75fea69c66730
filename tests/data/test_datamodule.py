from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer

from efficientllava.data.collator import Collator
from efficientllava.data.datamodule import GroupedBatches, RecoveryData, ShardedBatches, ids_digest
from efficientllava.data.records import usable
from efficientllava.data.splits import load_split
from efficientllava.runtime.errors import UserError
from efficientllava.settings.schema import DataConfig
from experiments.tiny_models.tiny import BUILDERS

DATA = DataConfig(name="digits_vqa", images=60, batch_size=4)


@pytest.fixture(scope="module")
def processor():
    return BUILDERS["tiny_llava"]()[1]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    sampler = ShardedBatches(10, 2, seed=3)
    first = list(sampler)
    assert first == list(ShardedBatches(10, 2, seed=3))
    assert first != list(ShardedBatches(10, 2, seed=4))
    assert sorted(index for batch in first for index in batch) == list(range(10))
    sampler.set_epoch(1)
    assert first != list(sampler)
    sampler.set_epoch(0)
    assert first == list(sampler)


def test_ranks_share_an_epoch_without_overlap() -> None:
    shards = [list(ShardedBatches(12, 2, 0, rank, 3)) for rank in range(3)]
    assert [len(shard) for shard in shards] == [2, 2, 2]
    assert sorted(index for shard in shards for batch in shard for index in batch) == list(range(12))
    # Together the ranks see the batches of one process with the same global batch.
    together = [[index for shard in shards for index in shard[step]] for step in range(2)]
    assert together == list(ShardedBatches(12, 6))


@pytest.mark.parametrize(("size", "world"), [(5, 1), (1, 2), (7, 2)])
def test_every_batch_is_full(size: int, world: int) -> None:
    shards = [list(ShardedBatches(size, 2, 0, rank, world)) for rank in range(world)]
    assert all(len(batch) == 2 for shard in shards for batch in shard)
    assert {index for shard in shards for batch in shard for index in batch} == set(range(size))
    assert len({len(shard) for shard in shards}) == 1


def test_batches_reach_a_trainer(processor) -> None:
    class Counter(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen: list[str] = []

        def training_step(self, batch, _index):
            self.seen += batch["ids"]
            return self.weight * batch["input_ids"].shape[0]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module, data = Counter(), RecoveryData(DATA, processor, data_frac=0.2, seed=1)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Trainer(max_epochs=1, use_distributed_sampler=False, enable_model_summary=False, **options).fit(module, data)
    assert len(module.seen) == 12
    assert set(module.seen) == {data.records[index].id for index in range(12)}
    assert ids_digest(data.records) == ids_digest(RecoveryData(DATA, processor, data_frac=0.2, seed=1).records)
    assert ids_digest(data.records) != ids_digest(RecoveryData(DATA, processor, data_frac=0.2, seed=2).records)


def test_overlong_prompts_fail_before_training(processor, tmp_path: Path) -> None:
    def turns(question: str) -> list[dict[str, str]]:
        return [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}]

    records = [{"id": f"good{i}", "conversations": turns("red")} for i in range(19)]
    records.append({"id": "long", "conversations": turns("red " * 600)})
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    config = DataConfig(name="conversations", path=str(path), batch_size=2)
    every = [record for split in ("train", "calibration", "minival") for record in load_split(config, split)]
    with pytest.raises(UserError, match=r"1 of 20 records cannot be used.*'long'.*data.max_bad_fraction allows 0"):
        usable(every, Collator(processor), config)
    config.max_bad_fraction = 0.1
    assert {record.id for record in usable(every, Collator(processor), config)} == {f"good{i}" for i in range(19)}
    assert all(record.id.startswith("good") for record in RecoveryData(config, processor).records)


def test_faulty_batch_size_is_named(processor) -> None:
    with pytest.raises(UserError, match=r"data.batch_size=0"):
        RecoveryData(DataConfig(name="digits_vqa", batch_size=0), processor)


# ---- the order of records -------------------------------------------------------------------------------------------


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
