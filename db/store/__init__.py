"""Store functions, one noun a file. Each takes the session of a scope; none commits."""
