"""What can go wrong in the store.

DatabaseError
├── NotFound         no row with that id or name
├── NameTaken        a model of that name exists
├── StillRunning     the row has a job that is not over
├── StaleAttempt     a job's process lost its job: a newer attempt owns it, or the job is over
└── SchemaMismatch   the database is not at this version's migration
"""


class DatabaseError(Exception):
    """Root of the store's errors."""


class NotFound(DatabaseError, LookupError):
    """No row with that id or name."""


class NameTaken(DatabaseError, ValueError):
    """A model of that name exists already."""


class StillRunning(DatabaseError):
    """The row cannot go while a job of it is queued or running."""


class StaleAttempt(DatabaseError):
    """The write came from an attempt that no longer owns its job; nothing was written."""


class SchemaMismatch(DatabaseError):
    """The database's migration is not the one this version needs."""
