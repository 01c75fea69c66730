from __future__ import annotations

from efficientllava.recovery.recover import BatchStream

from .conftest import Data


def ids(stream: BatchStream) -> list[list[str]]:
    return [batch["ids"] for batch in stream]


def test_a_stream_covers_each_epoch_in_an_order_of_its_own():
    batches = ids(BatchStream(Data(24, 4).train_dataloader(), 12))
    assert len(batches) == 12
    first, second = ([name for batch in part for name in batch] for part in (batches[:6], batches[6:]))
    assert sorted(first) == sorted(second) == sorted(map(str, range(24)))
    assert first != second


def test_a_stream_goes_on_where_its_state_was_taken():
    whole = ids(BatchStream(Data(24, 4).train_dataloader(), 14))
    for stop in (1, 6, 9, 14):
        stream = BatchStream(Data(24, 4).train_dataloader(), 14)
        taken = [batch["ids"] for batch, _ in zip(stream, range(stop), strict=False)]
        again = BatchStream(Data(24, 4).train_dataloader(), 14)
        again.load_state_dict({"position": stop})
        assert taken + ids(again) == whole and len(again) == 14
