"""The tables. Each constant belongs to one migration and is never changed afterwards: add a new migration instead.

JSON is stored as text, times are unix seconds unless a column says otherwise, a NULL value of a point is a
number that was not finite (SQLite stores nan as NULL).
"""

CORE = (
    """CREATE TABLE runs (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL,
        slot INTEGER NOT NULL DEFAULT 0,
        status TEXT NOT NULL,
        spec TEXT NOT NULL,
        created REAL NOT NULL, queued REAL, started REAL, ended REAL,
        pid INTEGER, pid_started REAL, host TEXT, heartbeat REAL, owner TEXT,
        progress REAL NOT NULL DEFAULT 0, left_seconds REAL, phase TEXT, stage INTEGER, message TEXT, error TEXT, wish TEXT,
        parent INTEGER, priority INTEGER NOT NULL DEFAULT 0,
        tags TEXT NOT NULL DEFAULT '[]', note TEXT NOT NULL DEFAULT '',
        starred INTEGER NOT NULL DEFAULT 0, archived INTEGER NOT NULL DEFAULT 0,
        log_path TEXT, folder TEXT,
        metric TEXT, base_value REAL, value REAL, value_low REAL, value_high REAL, n INTEGER,
        seconds REAL, peak_bytes INTEGER, size_bytes INTEGER, trainable INTEGER, parameters INTEGER, tokens_per_second REAL
    ) STRICT""",
    "CREATE INDEX runs_queue ON runs (status, priority DESC, id)",
    "CREATE INDEX runs_created ON runs (archived, created)",
    "CREATE INDEX runs_name ON runs (name)",
    # head: number of the last append; epoch: how often points were taken back; pruned: touches up to here are gone
    """CREATE TABLE heads (
        run_id INTEGER PRIMARY KEY, head INTEGER NOT NULL DEFAULT 0, epoch INTEGER NOT NULL DEFAULT 0,
        pruned INTEGER NOT NULL DEFAULT 0
    ) STRICT""",
    """CREATE TABLE stages (
        run_id INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        position INTEGER NOT NULL, method TEXT NOT NULL, settings TEXT NOT NULL, status TEXT,
        started REAL, ended REAL, seconds REAL, reasons TEXT, summary TEXT,
        PRIMARY KEY (run_id, position)
    ) STRICT, WITHOUT ROWID""",
    # clock: the series is sampled by time, its step is t in milliseconds
    """CREATE TABLE series (
        id INTEGER PRIMARY KEY, run_id INTEGER NOT NULL, name TEXT NOT NULL, unit TEXT, clock INTEGER NOT NULL DEFAULT 0,
        count INTEGER NOT NULL DEFAULT 0, last_step INTEGER, last_value REAL, last_t REAL,
        UNIQUE (run_id, name)
    ) STRICT""",
    # n: number of the append that wrote the point, so that a reader asks for what is new. No foreign key: it would
    # be looked up for every point.
    """CREATE TABLE points (
        series_id INTEGER NOT NULL, step INTEGER NOT NULL, value REAL, t REAL NOT NULL, n INTEGER NOT NULL,
        PRIMARY KEY (series_id, step)
    ) STRICT, WITHOUT ROWID""",
    # the lowest step that append n wrote in a series: where a reader with an older cursor starts to look
    """CREATE TABLE touches (
        run_id INTEGER NOT NULL, n INTEGER NOT NULL, series_id INTEGER NOT NULL, low INTEGER NOT NULL,
        PRIMARY KEY (run_id, n, series_id)
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE events (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        run_id INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        kind TEXT NOT NULL, text TEXT NOT NULL, t REAL NOT NULL, step INTEGER, data TEXT NOT NULL DEFAULT '{}'
    ) STRICT""",
    "CREATE INDEX events_run ON events (run_id, id)",
    """CREATE TABLE layer_maps (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        run_id INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        step INTEGER NOT NULL, t REAL NOT NULL, figures TEXT NOT NULL
    ) STRICT""",
    "CREATE INDEX layer_maps_run ON layer_maps (run_id, step)",
    """CREATE TABLE evaluations (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        run_id INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        name TEXT NOT NULL, stage INTEGER NOT NULL, step INTEGER NOT NULL, t REAL NOT NULL,
        metric TEXT NOT NULL, value REAL, low REAL, high REAL, n INTEGER NOT NULL,
        scores BLOB NOT NULL, weights BLOB, items_hash TEXT NOT NULL, extra TEXT NOT NULL DEFAULT '{}',
        UNIQUE (run_id, name, stage, step)
    ) STRICT""",
    "CREATE TABLE forecasts (run_id INTEGER PRIMARY KEY REFERENCES runs (id) ON DELETE CASCADE, data TEXT NOT NULL) STRICT",
    "CREATE TABLE footprints (run_id INTEGER PRIMARY KEY REFERENCES runs (id) ON DELETE CASCADE, data TEXT NOT NULL) STRICT",
    """CREATE TABLE artifacts (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        run_id INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
        kind TEXT NOT NULL, path TEXT NOT NULL, bytes INTEGER, sha256 TEXT, meta TEXT NOT NULL DEFAULT '{}', created REAL NOT NULL,
        UNIQUE (run_id, kind, path)
    ) STRICT""",
    """CREATE TABLE claims (
        id INTEGER PRIMARY KEY AUTOINCREMENT, method TEXT NOT NULL, key TEXT NOT NULL, verdict TEXT, data TEXT NOT NULL,
        updated REAL NOT NULL, UNIQUE (method, key)
    ) STRICT""",
    """CREATE TABLE votes (
        id INTEGER PRIMARY KEY AUTOINCREMENT, created REAL NOT NULL, prompt TEXT NOT NULL, variants TEXT NOT NULL,
        winner TEXT, seed INTEGER, texts TEXT NOT NULL, extra TEXT NOT NULL DEFAULT '{}'
    ) STRICT""",
    "CREATE TABLE presets (name TEXT PRIMARY KEY, spec TEXT NOT NULL, note TEXT NOT NULL, updated REAL NOT NULL) STRICT",
    "CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    "CREATE TABLE leases (name TEXT PRIMARY KEY, owner TEXT NOT NULL, until REAL NOT NULL) STRICT",
)

# Each scalar of a run's settings, so that `minutes:2` and `method:lora` are index look-ups, and words for free search.
SEARCH = (
    """CREATE TABLE facets (
        run_id INTEGER NOT NULL, path TEXT NOT NULL, leaf TEXT NOT NULL, text TEXT NOT NULL, number REAL
    ) STRICT""",
    "CREATE INDEX facets_leaf ON facets (leaf, text, run_id)",
    "CREATE INDEX facets_path ON facets (path, text, run_id)",
    "CREATE INDEX facets_run ON facets (run_id)",
    """CREATE VIRTUAL TABLE run_search USING fts5 (
        name, tags, note, settings, tokenize = "unicode61 remove_diacritics 2", prefix = '2 3'
    )""",
)

# A sweep is a spec, a space and objectives; each trial is a run like any other. Values are in the order of the objectives.
SWEEPS = (
    """CREATE TABLE sweeps (
        id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, status TEXT NOT NULL, spec TEXT NOT NULL, plan TEXT NOT NULL,
        created REAL NOT NULL, started REAL, ended REAL, owner TEXT, heartbeat REAL, wish TEXT, message TEXT,
        note TEXT NOT NULL DEFAULT ''
    ) STRICT""",
    """CREATE TABLE trials (
        sweep_id INTEGER NOT NULL REFERENCES sweeps (id) ON DELETE CASCADE,
        number INTEGER NOT NULL, run_id INTEGER, state TEXT NOT NULL, params TEXT NOT NULL, vals TEXT, attempt INTEGER NOT NULL DEFAULT 1,
        node TEXT, created REAL NOT NULL, started REAL, ended REAL, message TEXT,
        PRIMARY KEY (sweep_id, number)
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX trials_run ON trials (run_id)",
)

# key: what decides the cost of a spec on a machine (model, data, methods with settings, training knobs, fingerprint of the machine)
PROBES = (
    """CREATE TABLE probes (
        key TEXT PRIMARY KEY, created REAL NOT NULL, data TEXT NOT NULL
    ) STRICT""",
)
