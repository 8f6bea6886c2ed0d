"""The migration history, run from the program: no alembic.ini, no command line.

An upgrade is one transaction that takes SQLite's write lock first, so two processes that start at once do not
both create the tables: the second waits and finds nothing to do.
"""

from pathlib import Path
from typing import Any

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from db.errors import SchemaMismatch
from db.session import Database, exists
from db.tables import Table

FOLDER = Path(__file__).parent / "migrations"


def upgrade(database: Database) -> None:
    """Bring the schema to this version's head; does nothing if it is there."""
    with database.connection() as connection:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def check(database: Database) -> None:
    """Raise SchemaMismatch unless the schema is exactly at this version's head."""
    found, wanted = current(database), head()
    if found != wanted:
        raise SchemaMismatch(
            f"the database is at migration {found or 'none'}, this version needs {wanted}; "
            "start `advisor serve` once to upgrade it, or use the version that wrote it"
        )


def opened(url: str) -> Database:
    """The database, which must be there and at this version's head; nothing is created. Raises SchemaMismatch."""
    if not exists(url):
        raise SchemaMismatch(f"there is no database at {url}; start `advisor serve` once on this data directory first")
    database = Database(url)
    check(database)
    return database


def current(database: Database) -> str | None:
    """The revision the database is at; None for an empty one."""
    with database.engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def head() -> str:
    """The newest revision of this version."""
    revision = ScriptDirectory.from_config(_config()).get_current_head()
    assert revision is not None
    return revision


def drift(database: Database) -> list[Any]:
    """What `alembic check` reports: differences between the migrated schema and db.tables; empty if none."""
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, Table.metadata))


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config
