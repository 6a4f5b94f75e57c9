"""Run the ``com-pt`` command: ``python -m com_pt`` and ``accelerate launch -m com_pt``."""

from com_pt.cli import main

if __name__ == "__main__":
    main()
