"""`python -m seerattn`, and `torchrun -m seerattn`: the command line."""

from seerattn.cli import main

main()
