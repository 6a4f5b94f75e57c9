"""``python -m morse_diffusion`` is the ``morse-diffusion`` command."""

from morse_diffusion.cli import main

if __name__ == "__main__":
    main()
