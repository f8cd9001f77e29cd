"""The command line: `python main.py COMMAND ...`; `python main.py --help` lists the commands."""

from ddim_pl.__main__ import main

if __name__ == "__main__":
    main()
