"""``python -m af_dcd``, which ``torchrun -m`` and ``accelerate launch -m`` run too."""

from af_dcd.cli import main

if __name__ == "__main__":
    main()
