"""The command `ddim-pl`, which is also `python -m ddim_pl` and `python main.py`."""

import atexit
import gc
import sys

from ddim_pl.cli_commands import exit_without_command
from ddim_pl.cli_errors import exit_if_callbacks_are_shadowed


def main() -> None:
    """Run the command line with the arguments of the process."""
    exit_if_callbacks_are_shadowed()
    exit_without_command(sys.argv[1:])

    # Half a million objects of PyTorch and Lightning stay to the end: none of them is garbage.
    gc.disable()
    from ddim_pl.cli import main as run

    gc.freeze()
    atexit.register(gc.unfreeze)  # libraries report what is left at the end as leaks
    gc.enable()
    run()


if __name__ == "__main__":
    main()
