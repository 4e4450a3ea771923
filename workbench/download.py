"""Chosen runs as one file that a browser saves: a zip of tables, or the HTML report."""

from __future__ import annotations

import base64
import importlib.util
import io
import tempfile
import zipfile

from engines.errors import InputError

TABLES = ("csv", "json", "parquet")
LARGEST = 60_000_000
"""Bytes that go to the browser in one piece; more is written by the command line."""


def offered() -> list[str]:
    """The formats of ``pack`` that this installation can write."""
    return [f for f in TABLES if f != "parquet" or importlib.util.find_spec("pyarrow")] + (
        ["report"] if importlib.util.find_spec("workbench.report") else [])


def pack(home, ids: list[int], format: str) -> dict:
    """``{"name", "type", "body"}``, body in base64.

    Raises:
        InputError: no run, an unknown format, or more than a browser takes in one piece.
        StorageError: the tables cannot be written.
    """
    if not ids:
        raise InputError("runs", ids, "no run is chosen", "Choose runs in the table")
    if format not in offered():
        raise InputError("format", format, "there is no such format here", "Choose " + ", ".join(offered()))
    if format == "report":
        from workbench import report
        return _answer("fettle-report.html", "text/html", report.page(ids, home=home).encode())
    buffer = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as pack:
            for path in home.store.export(ids, folder, format):
                pack.write(path, path.name)
        return _answer(f"fettle-{format}.zip", "application/zip", buffer.getvalue())


def _answer(name: str, kind: str, body: bytes) -> dict:
    if len(body) > LARGEST:
        raise InputError("runs", f"{len(body) / 1e6:.0f} MB", "too much for one download", "Choose fewer runs")
    return {"name": name, "type": kind, "body": base64.b64encode(body).decode()}
