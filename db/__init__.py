"""What the service remembers: tables, one migration history, the session scope and the store functions.

Knows neither torch nor the web: bytes and plain values go in and come out. The migrations are the only truth
about the schema (`db.migrate.upgrade`); nothing here creates a table from the classes in `db.tables`.
"""
