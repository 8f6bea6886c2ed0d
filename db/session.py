"""The database and its two scopes: `reading()` and `writing()`. They alone commit and roll back.

SQLite: WAL lets readers go on while one writes; a writer takes the lock at its first statement (BEGIN
IMMEDIATE), so two writers queue for `busy_timeout` instead of failing when the second one upgrades its read
lock; foreign keys are off in SQLite unless asked for, on each connection. pysqlite's own transaction control
is turned off, because it would begin late, and not at all before DDL (true for Python 3.11's sqlite3).
"""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

BUSY_TIMEOUT_MS = 15_000
BEGIN = "advisor_begin"  # execution option: how a transaction begins on SQLite


def exists(url: str) -> bool:
    """Whether there is a database to open. Of a server only connecting tells, so that is True."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return True
    return bool(parsed.database) and Path(parsed.database or "").is_file()


class Database:
    """One engine. Safe to share between threads; not across a fork."""

    def __init__(self, url: str) -> None:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite" and parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        self.engine = _engine(url)
        self._writer = self.engine.execution_options(**{BEGIN: "BEGIN IMMEDIATE"})

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session on one consistent snapshot; whatever it changes is thrown away."""
        with Session(self.engine, expire_on_commit=False) as session:
            yield session
            session.expunge_all()

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A session that commits at the end, or rolls all of it back if the block raises."""
        with Session(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A bare writing connection, for migrations."""
        with self._writer.begin() as connection:
            yield connection

    def ping(self) -> None:
        """One trivial query; raises SQLAlchemyError if the database does not answer."""
        with self.reading() as session:
            session.execute(text("SELECT 1"))

    def close(self) -> None:
        """Give back every connection."""
        self.engine.dispose()


def _engine(url: str) -> Engine:
    engine = create_engine(url, pool_size=16, max_overflow=48)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    _use_wal(cursor)
    # In WAL mode a power cut may then lose the last commits, never half of one.
    cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _use_wal(cursor: Any) -> None:
    """Switch the file to WAL, which it then stays in.

    The switch needs the file for itself, and SQLite does not wait for that: two processes that open a new file at once
    would fail each other, whatever the busy timeout.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get(BEGIN, "BEGIN"))
