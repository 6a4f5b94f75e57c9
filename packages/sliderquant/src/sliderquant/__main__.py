"""``python -m sliderquant`` is the ``sliderquant`` command."""

from sliderquant.cli import main

if __name__ == "__main__":
    main()
