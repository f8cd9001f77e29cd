"""The command line: `python main.py COMMAND ...`; `python main.py --help` lists the commands."""

import atexit
import gc
import sys

from ddim_pl.cli_commands import exit_without_command
from ddim_pl.cli_errors import exit_if_callbacks_are_shadowed

if __name__ == "__main__":
    exit_if_callbacks_are_shadowed()
    exit_without_command(sys.argv[1:])

    # Half a million objects of PyTorch and Lightning stay to the end: none of them is garbage.
    gc.disable()
    from ddim_pl.cli import main

    gc.freeze()
    atexit.register(gc.unfreeze)  # libraries report what is left at the end as leaks
    gc.enable()
    main()
