"""Built-in model families and data sets: what the service can train from a description alone."""
