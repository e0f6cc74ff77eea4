"""`python -m gateway.cli` is `hostler`."""

from gateway.cli import main

main()
