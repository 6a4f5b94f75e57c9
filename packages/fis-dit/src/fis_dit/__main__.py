"""``python -m fis_dit`` is the ``fis-dit`` command."""

from fis_dit.cli import main

if __name__ == "__main__":
    main()
