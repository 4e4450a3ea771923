"""Older databases are brought up, newer ones are refused, and several processes may do it at once."""

import multiprocessing
import sqlite3

import pytest

from storage import StorageError, Store, connection, migrations


def _older(path, version):
    db = sqlite3.connect(path, isolation_level=None)
    migrations.migrate(db, path, upto=version)
    return db


def test_a_database_of_the_first_version_is_brought_up(tmp_path):
    path = tmp_path / "fettle.db"
    db = _older(path, 1)
    db.execute("""INSERT INTO runs (name, status, spec, created, tags) VALUES ('old-one', 'finished', '{"data":"digits","budget":{"minutes":3}}', 1.0,
                  '["kept"]')""")
    db.execute("INSERT INTO heads (run_id) VALUES (1)")
    db.close()
    store = Store(path)
    assert migrations.version(store.connection) == migrations.VERSION
    assert store.run(1)["name"] == "old-one" and store.notes and "version 1" in store.notes[0]
    assert store.count_runs(search="old digits") == 1 and store.count_runs(where=[("minutes", "=", 3)]) == 1 and store.count_runs(tag="kept") == 1
    copy = sqlite3.connect(tmp_path / "fettle.db.v1.bak")
    assert migrations.version(copy) == 1 and copy.execute("SELECT name FROM runs").fetchall() == [("old-one",)]
    assert Store(path).notes == [], "the second time there is nothing to do"


def test_every_older_version_ends_with_the_schema_of_a_new_file(tmp_path):
    def schema(store):
        return sorted(store.connection.execute("SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'").fetchall(), key=str)

    new = schema(Store(tmp_path / "new.db"))
    for version in range(1, migrations.VERSION):
        _older(tmp_path / f"{version}.db", version).close()
        assert schema(Store(tmp_path / f"{version}.db")) == new


def test_a_newer_version_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "fettle.db"
    store = Store(path)
    store.connection.execute(f"PRAGMA user_version = {migrations.VERSION + 3}")
    store.close()
    with pytest.raises(StorageError, match=f"version {migrations.VERSION + 3}.*Update the program") as e:
        Store(path)
    assert "\n" not in str(e.value)
    db = sqlite3.connect(path)
    assert migrations.version(db) == migrations.VERSION + 3


def test_a_failed_migration_leaves_the_database_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "fettle.db"
    _older(path, 1).close()

    def broken(db):
        db.execute("CREATE TABLE half (a)")
        raise KeyError("defect")

    monkeypatch.setattr(migrations, "MIGRATIONS", (migrations.MIGRATIONS[0], broken))
    with pytest.raises(KeyError):
        Store(path)
    db = sqlite3.connect(path)
    assert migrations.version(db) == 1
    assert db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'half'").fetchone()[0] == 0


def test_strict_tables(tmp_path):
    store = Store(tmp_path / "fettle.db")
    tables = store.connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'run_search%' "
                                      "AND name NOT LIKE 'sqlite_%'").fetchall()
    assert len(tables) >= 18
    for name, sql in tables:
        assert "STRICT" in sql, name
    assert "WITHOUT ROWID" in dict(tables)["points"]
    with pytest.raises(sqlite3.IntegrityError):
        store.connection.execute("INSERT INTO points VALUES (1, 1, 'text', 0.0, 1)")


def _open(path, barrier, results):
    barrier.wait()
    try:
        results.put(Store(path).create_run({}, name="x"))
    except BaseException as e:
        results.put(repr(e))


def test_several_processes_open_a_new_database_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(5), context.Queue()
    workers = [context.Process(target=_open, args=(tmp_path / "fettle.db", barrier, results)) for _ in range(5)]
    for w in workers:
        w.start()
    found = sorted((results.get(timeout=30) for _ in workers), key=str)
    for w in workers:
        w.join(10)
    assert found == [1, 2, 3, 4, 5]


def test_no_write_ahead_log_on_a_network_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "filesystem", lambda path: "nfs4")
    store = Store(tmp_path / "fettle.db")
    assert store.journal == "delete" and "nfs4" in store.notes[0]
    run = store.create_run({}, name="a")
    store.append(run, [("x", 0, 1.0, 0.0)])
    assert not (tmp_path / "fettle.db-wal").exists()
    monkeypatch.setattr(connection, "filesystem", lambda path: "ext4")
    again = Store(tmp_path / "fettle.db")
    assert again.journal == "wal" and again.notes == [] and again.points(run, "x")["value"] == [1.0]


def test_filesystem_names_the_mount(tmp_path):
    assert connection.filesystem(tmp_path) != "" or not connection.Path("/proc/self/mounts").exists()
    assert connection.filesystem(connection.Path("/proc/self")) in ("proc", "")
