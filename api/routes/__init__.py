"""The REST calls, one noun a file."""
