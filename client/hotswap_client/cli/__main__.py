"""`python -m hotswap_client.cli`: the command where no script of it is on the path."""

from hotswap_client.cli import main

main()
