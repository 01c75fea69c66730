from experiments.speed import pruning as bench


def test_the_bound_is_layer_gram_and_hidden_states(monkeypatch):
    for name, value in {"HIDDEN": 32, "LAYERS": 2, "HEADS": 2, "CHANNELS": 48, "VOCABULARY": 64, "LENGTH": 16}.items():
        monkeypatch.setattr(bench, name, value)
    model = bench.middle_sized()
    layer = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert bench.memory_bound(model) == 4 * layer + 8 * (32 * 32 + 48 * 48) + 4 * 4 * 4 * 16 * 32


def test_memory_rows_cover_all_methods(monkeypatch):
    for name, value in {"HIDDEN": 32, "LAYERS": 2, "HEADS": 4, "CHANNELS": 48, "VOCABULARY": 64, "LENGTH": 16}.items():
        monkeypatch.setattr(bench, name, value)
    rows = bench.memory_rows()
    assert len(rows) == len(bench.METHODS)
    assert all(row.measured > 0 and row.reference > 0 for row in rows)
