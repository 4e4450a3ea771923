"""Verdicts that come with Fettle: shown until this machine has its own, never for an experiment that has changed."""

import dataclasses
import json

import pytest

from engines import registry
from engines.claim import Claim
from workbench import claims, shipped, verdicts
from workbench.home import Home

CLAIM = Claim("k", "Better than the other.", ours={"method": "lora", "rank": 2}, against={"method": "lora", "rank": 1}, differs="small")
FOUND = dict(verdict="reproduced", metric="bits/byte", ours=1.0, against=1.123456789, difference=-0.123456789, low=-0.2, high=-0.1, n=120, seeds=3,
             took=12.3, reason="", measure="quality")


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "FILE", tmp_path / "claims.json")
    monkeypatch.setattr(verdicts, "PAGE", tmp_path / "CLAIMS.md")
    monkeypatch.setattr(registry.get("lora"), "claims", (CLAIM,))
    return tmp_path


def test_what_was_collected_is_shown_where_nothing_was_measured(files, tmp_path):
    maker, user = Home.open(tmp_path / "maker"), Home.open(tmp_path / "user")
    assert claims.listed("lora", user)[0]["verdict"] is None
    maker.store.put_claim("lora", "k", mark=claims.mark(CLAIM), says="old words", setting="s", **FOUND)
    shipped.FILE.write_text(json.dumps(verdicts.collect(maker)))
    row = claims.listed("lora", user)[0]
    assert row["verdict"] == "reproduced" and row["machine"] and row["date"] and row["says"] == CLAIM.says
    assert row["against"] == 1.12346 and "Reproduced" in claims.sentence(row)
    user.store.put_claim("lora", "k", mark=claims.mark(CLAIM), **FOUND | {"verdict": "within noise"})
    own = claims.listed("lora", user)[0]
    assert own["verdict"] == "within noise" and "date" not in own, "one's own figure comes first"


def test_a_changed_experiment_has_no_verdict_and_is_dropped(files, tmp_path, monkeypatch):
    maker = Home.open(tmp_path / "maker")
    maker.store.put_claim("lora", "k", mark=claims.mark(CLAIM), **FOUND)
    shipped.FILE.write_text(json.dumps(verdicts.collect(maker)))
    monkeypatch.setattr(registry.get("lora"), "claims", (dataclasses.replace(CLAIM, steps=61),))
    assert claims.listed("lora", maker)[0]["verdict"] is None
    assert "lora" not in verdicts.collect(maker)
    monkeypatch.setattr(registry.get("lora"), "claims", (dataclasses.replace(CLAIM, says="The same in other words."),))
    assert claims.listed("lora")[0]["verdict"] == "reproduced"
    assert verdicts.collect(Home.open(tmp_path / "other"))["lora"]["k"]["ours"] == 1.0, "kept when this database knows nothing newer"
    assert "Reproduced" in verdicts.page() and "The same in other words." in verdicts.page()


def test_what_comes_with_fettle_belongs_to_claims_of_today_and_its_page_is_current():
    for method, rows in shipped.bundled().items():
        marks = {c.key: shipped.digest(claims.mark(c)) for c in registry.described(method).claims}
        for key, row in rows.items():
            assert marks.get(key) == row["of"], f"{method} {key} has changed: measure it again, then python -m workbench.verdicts"
            assert row["verdict"] in claims.VERDICTS and row["took"] > 0 and row["machine"] and row["date"]
    if verdicts.PAGE.exists():
        assert verdicts.PAGE.read_text() == verdicts.page(), "run python -m workbench.verdicts"
