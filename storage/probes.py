"""What short trials measured, under a key of what decides the cost; the latest of each key is kept."""

from __future__ import annotations

import time

from storage.codec import decode, encode


class Probes:
    """Part of ``Store``."""

    def put_probe(self, key: str, data: dict, created: float | None = None) -> None:
        """Keep what a probe measured; an earlier one of the same key is replaced."""
        with self.write() as db:
            db.execute("INSERT OR REPLACE INTO probes (key, created, data) VALUES (?, ?, ?)",
                       (key, time.time() if created is None else created, encode(data)))

    def probe(self, key: str) -> dict | None:
        """The latest measurement under ``key`` with its ``created`` (unix seconds), or None."""
        with self.read() as db:
            found = db.execute("SELECT created, data FROM probes WHERE key = ?", (key,)).fetchone()
        return None if found is None else decode(found[1], {}) | {"created": found[0]}

    def delete_probe(self, key: str) -> bool:
        """Forget a measurement; False where there is none."""
        with self.write() as db:
            return db.execute("DELETE FROM probes WHERE key = ?", (key,)).rowcount > 0
