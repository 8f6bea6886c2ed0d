"""`python -m advisor.cli`, for where the `advisor` script is not on the path."""

from advisor.cli import main

main()
