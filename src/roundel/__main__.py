"""`python -m roundel`."""

from roundel.cli.main import main

main()
