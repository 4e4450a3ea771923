"""Claims: verdicts from scores with known answers, what is kept, what is refused, one tiny experiment from end to end."""

import dataclasses
import json

import numpy as np
import pytest

from engines import registry
from engines.claim import LARGER, Claim
from engines.errors import InputError
from workbench import claim_search, claims
from workbench.home import Home

CLAIM = Claim("k", "says", ours={"method": "lora", "rank": 2}, against={"method": "lora", "rank": 1})


def side(mean, spread=0.0, seeds=3, n=200, metric="bits/byte"):
    rng = np.random.default_rng(5)
    items = rng.uniform(50, 150, n)
    scores = np.stack([items * (mean + spread * rng.standard_normal()) for _ in range(seeds)])
    return dict(scores=scores.tolist(), weights=items.tolist(), metric=metric, rate=1e-3, searched=[1e-3], trainable=10, seconds=0.1)


def test_verdicts_on_quality_follow_the_interval():
    assert claims.of_quality(CLAIM, side(1.0), side(1.1))["verdict"] == "reproduced"
    assert claims.of_quality(CLAIM, side(1.1), side(1.0))["verdict"] == "not reproduced"
    noisy = claims.of_quality(CLAIM, side(1.0, 0.1), side(1.02, 0.1))
    assert noisy["verdict"] == "within noise" and noisy["low"] < 0 < noisy["high"]
    level = dataclasses.replace(CLAIM, expect="not worse", margin=0.02)
    assert claims.of_quality(level, side(1.01), side(1.0))["verdict"] == "reproduced"
    assert claims.of_quality(level, side(1.05), side(1.0))["verdict"] == "not reproduced"


def test_accuracy_counts_the_other_way():
    right, wrong = dict(side(1.0, metric="accuracy"), weights=None), dict(side(1.0, metric="accuracy"), weights=None)
    right["scores"], wrong["scores"] = np.ones((3, 100)).tolist(), np.zeros((3, 100)).tolist()
    found = claims.of_quality(CLAIM, right, wrong)
    assert found["verdict"] == "reproduced" and found["difference"] == 1.0


def test_verdicts_on_ratios_need_all_of_the_range():
    less = Claim("m", "says", ours={"method": "lora"}, against={"method": "full"}, measure="memory", expect="at most", factor=0.8)
    assert claims.of_ratio(less, [70, 72], [100, 101])["verdict"] == "reproduced"
    assert claims.of_ratio(less, [70, 85], [100, 101])["verdict"] == "within noise"
    assert claims.of_ratio(less, [95, 96], [100, 101])["verdict"] == "not reproduced"
    assert claims.of_ratio(less, [95], [0])["verdict"] == "not comparable"


def test_every_registered_claim_names_methods_that_exist():
    seen = 0
    for id, cls in registry.methods().items():
        keys = [c.key for c in cls.claims]
        assert len(keys) == len(set(keys)), id
        for claim in cls.claims:
            seen += 1
            assert claim.says.endswith(".") and (claim.not_comparable or claim.differs), f"{id} {claim.key}: say how the setting differs"
            for stage in filter(None, (claim.ours, claim.against, *claim.before)):
                registry.build(dict(stage))
            if not claim.not_comparable:
                assert claim.ours["method"] == id or any(s["method"] == id for s in claim.before)
    assert seen


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="bone has no such claim. Choose above-lora"):
        claims.check("bone", "nothing")
    with pytest.raises(InputError, match="states no claim"):
        claims.check("full")
    with pytest.raises(InputError, match="seeds = 2"):
        claims.check("bone", seeds=2)
    with pytest.raises(ValueError, match="measure is one of"):
        Claim("x", "y", measure="beauty")


def test_an_experiment_is_kept_and_forgotten_when_the_claim_changes(tmp_path, monkeypatch):
    home = Home.open(tmp_path)
    small = Claim("digits", "says so.", ours={"method": "lora", "rank": 4}, against={"method": "lora", "rank": 1}, model="digits-vit",
                  data="digits", steps=4, batch=16, length=8, precision="fp32", rates=(1.0,), differs="everything is smaller")
    monkeypatch.setattr(registry.get("lora"), "claims", (small,))
    row, = claims.check("lora", home=home, threads=1)
    assert row["verdict"] in claims.VERDICTS and row["metric"] == "accuracy" and row["n"] > 50 and len(row["by_seed"][0]) == 3
    assert 0.5 < row["ours"] <= 1.0 and row["trainable"][0] > row["trainable"][1]
    known, = claims.listed("lora", home)
    assert known["verdict"] == row["verdict"] and known["ours"] == pytest.approx(row["ours"])
    json.dumps(known)
    assert "3 seeds" in claims.sentence(known)
    monkeypatch.setattr(registry.get("lora"), "claims", (dataclasses.replace(small, steps=5),))
    assert claims.listed("lora", home)[0]["verdict"] is None


def test_the_search_goes_on_where_the_best_rate_lies_at_its_end():
    row = lambda value: dict(scores=np.full(4, value), weights=np.ones(4), metric="bits/byte")  # noqa: E731
    assert claim_search.further({1.0: row(3.0), 3.0: row(2.0), 9.0: row(1.0)}, 3) == 27.0
    assert claim_search.further({1.0: row(1.0), 3.0: row(2.0), 9.0: row(3.0)}, 3) == pytest.approx(1 / 3)
    assert claim_search.further({1.0: row(2.0), 3.0: row(1.0), 9.0: row(2.0)}, 3) is None
    assert claim_search.further({1.0: row(3.0), 3.0: row(2.0), 9.0: row(np.nan)}, 3) is None, "beyond it training diverges"
    assert claim_search.further({float(3 ** i): row(-i) for i in range(5)}, 3) is None, "not for ever"
    assert claim_search.further({1.0: row(1.0)}, 1) is None


def test_a_claim_says_the_steps_that_are_made_and_the_shape():
    told = lambda measure, **more: claims.setting(dataclasses.replace(CLAIM, measure=measure, steps=60, **more))  # noqa: E731
    assert "12 steps" in told("memory", shape=LARGER) and "width 384" in told("memory", shape=LARGER) and "tie_word" not in told("memory", shape=LARGER)
    assert "15 steps" in told("seconds") and "60 steps" in told("quality") and "60 steps" in told("duration")


def test_figures_are_told_with_their_units():
    row = dict(verdict="reproduced", difference=0.5, low=0.4, high=0.6)
    for measure, ours, against, text in (("memory", 9.678e7, 1.741e8, "96.8 MB against 174 MB"), ("optimizer", 2.5e9, 4e9, "2.5 GB against 4 GB"),
                                         ("trainable", 112_640, 204_800, "112,640 parameters against 204,800 parameters"),
                                         ("seconds", 0.2527, 0.4432, "0.253 s against 0.443 s"), ("repetition", 0.59, 0.79, "59.0% against 79.0%"),
                                         ("entropy", 3.724, 4.569, "3.72 bits against 4.57 bits")):
        assert claims.sentence(row | dict(measure=measure, ours=ours, against=against)).endswith(text + ".")


def test_a_best_rate_at_the_end_of_the_search_is_told():
    found = claims.of_quality(CLAIM, side(1.0), side(1.1)) | dict(seeds=3, measure="quality")
    inside, edge = [1e-3, [1e-4, 1e-3, 1e-2]], [1e-2, [1e-4, 1e-3, 1e-2]]
    told = lambda a, b: claims.sentence(found | dict(rates=[a[0], b[0]], searched=[a[1], b[1]]))  # noqa: E731
    assert "end of the search" not in told(inside, inside)
    assert "of the other side lay at the end of the search" in told(inside, edge)
    assert "of this method and of the other side lay" in told(edge, edge)


SMALL = Claim("digits", "says so.", ours={"method": "lora", "rank": 4}, against={"method": "lora", "rank": 1}, model="digits-vit", data="digits", steps=4,
              batch=16, length=8, precision="fp32", rates=(1.0,), differs="everything is smaller")


def test_a_training_that_claims_share_is_made_once(tmp_path, monkeypatch):
    """The second claim has the same other side; only its own side is trained, and no seconds are told of a kept training."""
    home = Home.open(tmp_path)
    second = dataclasses.replace(SMALL, key="other", ours={"method": "lora", "rank": 2})
    monkeypatch.setattr(registry.get("lora"), "claims", (SMALL, second))
    first, other = claims.check("lora", home=home, threads=1)
    assert first["reused"] == 0 and len(first["seconds"]) == 2
    assert other["reused"] == 3 and "seconds" not in other, "three seeds of the shared side"
    assert other["by_seed"][1] == first["by_seed"][1] and other["rates"][1] == first["rates"][1]


def test_kept_trainings_know_what_they_depend_on(tmp_path, monkeypatch):
    from workbench import claim_trainings
    kept, made = claim_trainings.Trainings(tmp_path / "t"), []
    take = lambda what: kept.take(what, lambda: made.append(what) or {"scores": np.ones(3), "weights": None, "seconds": 0.5})  # noqa: E731
    assert take({"rate": 1.0})["kept"] is False and take({"rate": 1.0})["kept"] is True and take({"rate": 2.0})["kept"] is False
    assert isinstance(take({"rate": 1.0})["scores"], np.ndarray)
    monkeypatch.setattr(claim_trainings, "code", lambda: "another version of the engines")
    assert take({"rate": 1.0})["kept"] is False
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"1")
    before = claim_trainings.stamp(tmp_path)
    file.write_bytes(b"22")
    assert claim_trainings.stamp(tmp_path) != before
    next((tmp_path / "t").glob("*.json")).write_text("{broken")
    monkeypatch.setattr(claim_trainings, "KEEP", 1)
    take({"rate": 9.0})
    assert len(list((tmp_path / "t").glob("*.json"))) == 1


def test_forgetting_is_scored_on_data_that_nothing_was_trained_on():
    from workbench import claiming
    claim = Claim("forgets", "Forgets less.", ours={"method": "lora", "rank": 1}, against={"method": "full"}, measure="forgetting",
                  elsewhere="python-code", steps=4, length=48, rates=(1.0,), differs="small")
    bench = claiming.Bench(dataclasses.asdict(claim))
    rows = claiming.quality(bench, 1)
    found = claims.of_quality(claim, rows["ours"], rows["against"])
    assert found["n"] == len(bench.other.items) > 100, "all items: none of them chose a rate"
    untrained = claim_search.ratio(**{k: v for k, v in bench.score(bench.model, bench.other).items() if k != "metric"})
    assert 0.9 * untrained < found["ours"] < found["learned"][0], "it knows its own code better than the reference prose"
    row = found | dict(measure="forgetting", seeds=3)
    assert "On the data trained on: " in claims.sentence(row) and "python-code: " in claims.setting(claim)
    with pytest.raises(ValueError, match="forgetting is scored elsewhere"):
        dataclasses.replace(claim, elsewhere="")
    with pytest.raises(ValueError, match="only forgetting is"):
        dataclasses.replace(CLAIM, elsewhere="python-code")


def test_merging_is_scored_against_each_adapter_alone():
    """Of one part nothing is lost; of two each item's loss is told; the search for a rate goes on here too."""
    from workbench import claim_merging, claiming
    claim = Claim("merged", "Keeps more.", ours={"method": "lora", "rank": 2}, against={"method": "lora", "rank": 1}, measure="merging", parts=2, steps=2,
                  model="digits-vit", data="digits", batch=16, length=8, precision="fp32", rates=(1.0, 3.0), differs="small")
    bench = claiming.Bench(dataclasses.asdict(claim))
    rows = claim_merging.merging(bench, 1)
    assert len(rows["ours"]["searched"]) > 2, "of two rates the best one lies at an end"
    assert np.asarray(rows["ours"]["scores"]).shape == (1, 2 * claim_merging.ROWS // 2)
    alone = claim_merging.added(bench.model, [bench.model])
    assert all((a == b).all() for a, b in zip(alone.state_dict().values(), bench.model.state_dict().values()))
    assert claims.of_quality(claim, rows["ours"], rows["against"])["verdict"] in claims.VERDICTS
