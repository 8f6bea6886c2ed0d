"""The one migration history (Alembic). `db.migrate` runs it."""
