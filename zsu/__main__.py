"""`python -m zsu` is the command `zsu`."""

from .cli import main

main()
