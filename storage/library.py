"""What belongs to no single run: settings, presets, votes, claims."""

from __future__ import annotations

import time
from typing import Any

from storage.codec import decode, encode
from storage.errors import NotFound


class Library:
    """Part of ``Store``."""

    def get_setting(self, key: str, default: Any = None) -> Any:
        """The value kept under ``key``, or ``default``."""
        with self.read() as db:
            found = db.execute("SELECT value FROM settings WHERE key = ?", (key,)).fetchone()
        return default if found is None else decode(found[0])

    def set_setting(self, key: str, value: Any) -> None:
        """Keep a JSON-able value under ``key``; None removes it."""
        with self.write() as db:
            if value is None:
                db.execute("DELETE FROM settings WHERE key = ?", (key,))
            else:
                db.execute("INSERT OR REPLACE INTO settings (key, value) VALUES (?, ?)", (key, encode(value)))

    def put_preset(self, name: str, spec: dict, note: str = "") -> None:
        """Keep a spec under a name; an older one of the same name is replaced."""
        with self.write() as db:
            db.execute("INSERT OR REPLACE INTO presets (name, spec, note, updated) VALUES (?, ?, ?, ?)", (name, encode(spec), note, time.time()))

    def presets(self) -> list[dict]:
        """Kept specs by name: name, spec, note, updated."""
        with self.read() as db:
            found = db.execute("SELECT name, spec, note, updated FROM presets ORDER BY name").fetchall()
        return [{"name": n, "spec": decode(s, {}), "note": note, "updated": u} for n, s, note, u in found]

    def delete_preset(self, name: str) -> None:
        """Forget a kept spec.

        Raises:
            NotFound: there is none of this name.
        """
        with self.write() as db:
            if not db.execute("DELETE FROM presets WHERE name = ?", (name,)).rowcount:
                raise NotFound(f"There is no preset {name!r}. List the presets to see their names.")

    def put_vote(self, prompt: str, variants: list, winner: str | None, seed: int | None, texts: list, extra: dict | None = None) -> int:
        """Keep a blind vote: which of ``variants`` answered best; ``winner`` None means a tie."""
        with self.write() as db:
            return db.execute("INSERT INTO votes (created, prompt, variants, winner, seed, texts, extra) VALUES (?, ?, ?, ?, ?, ?, ?)",
                              (time.time(), prompt, encode(list(variants)), winner, seed, encode(list(texts)), encode(extra or {}))).lastrowid

    def votes(self, limit: int = 100) -> list[dict]:
        """The latest votes, newest first."""
        with self.read() as db:
            found = db.execute("SELECT id, created, prompt, variants, winner, seed, texts, extra FROM votes ORDER BY id DESC LIMIT ?",
                               (limit,)).fetchall()
        return [{"id": i, "created": c, "prompt": p, "variants": decode(v, []), "winner": w, "seed": s, "texts": decode(t, []),
                 "extra": decode(x, {})} for i, c, p, v, w, s, t, x in found]

    def put_claim(self, method: str, key: str, *, verdict: str | None = None, **data) -> int:
        """Keep what a paper claims of a method beside what was measured; ``key`` tells the claims of one method apart.

        ``data`` are free fields (claim, source, setting, paper value, ours, low, high, runs, reason ...).
        """
        with self.write() as db:
            return db.execute(
                """INSERT INTO claims (method, key, verdict, data, updated) VALUES (?, ?, ?, ?, ?) ON CONFLICT (method, key) DO UPDATE SET
                   verdict = excluded.verdict, data = excluded.data, updated = excluded.updated RETURNING id""",
                (method, key, verdict, encode(data), time.time())).fetchall()[0][0]

    def claims(self, method: str | None = None) -> list[dict]:
        """Claims of one method or of all: id, method, key, verdict, updated and the free fields."""
        with self.read() as db:
            found = db.execute("SELECT id, method, key, verdict, data, updated FROM claims WHERE method = coalesce(?, method) "
                               "ORDER BY method, id", (method,)).fetchall()
        return [decode(d, {}) | {"id": i, "method": m, "key": k, "verdict": v, "updated": u} for i, m, k, v, d, u in found]
