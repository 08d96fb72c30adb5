"""`python -m node` is `qmesh-node`."""

from node.cli.app import main

main()
