"""The HTTP service: the app and its routes, and the jobs that train models for it."""
