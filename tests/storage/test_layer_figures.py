"""The layer map of a run is made of what its stages reported one after the other."""

from storage import Store


def test_latest_of_each_figure_survives_the_next_stage(tmp_path):
    store = Store(tmp_path / "fettle.db")
    run = store.create_run({}, name="a")
    assert store.layer_figures(run) is None
    store.put_layers(run, 0, {"sparsity": [[0, "q", 0.5]]})
    store.put_layers(run, 3, {"rank": [[0, "q", 8]]})
    store.put_layers(run, 9, {"rank": [[0, "q", 5]], "bits": [[0, "q", 8]]})
    found = store.layer_figures(run)
    assert found["step"] == 9 and found["id"] == store.layers(run)["id"]
    assert found["figures"] == {"sparsity": [[0, "q", 0.5]], "rank": [[0, "q", 5]], "bits": [[0, "q", 8]]}
