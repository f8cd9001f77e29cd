"""The command line: `python main.py fit|validate|test|predict --config FILE`."""

from ddim_pl.cli import main

if __name__ == "__main__":
    main()
