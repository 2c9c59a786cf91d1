"""`python -m reshard`."""

from reshard.cli.main import console

console()
