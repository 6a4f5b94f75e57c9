"""``python -m scalekd``, which torchrun needs."""

from scalekd.cli import main

main()
