"""Jobs: the worker that claims them, the process of each one, and what the kinds do.

The `jobs` row is the only truth. Nothing passes between the worker and a job's process but the database: the
worker starts the process and watches whether it lives; the process writes under its attempt's fence.
"""
