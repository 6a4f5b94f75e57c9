"""``python -m scalekd``, which torchrun and ``accelerate launch -m`` need."""

from scalekd.cli import main

if __name__ == "__main__":
    main()
