"""The command line: `python main.py COMMAND ...`; `python main.py --help` lists the commands."""

import sys

from ddim_pl.cli_commands import exit_without_command
from ddim_pl.cli_errors import exit_if_callbacks_are_shadowed

if __name__ == "__main__":
    exit_if_callbacks_are_shadowed()
    exit_without_command(sys.argv[1:])

    from ddim_pl.cli import main

    main()
