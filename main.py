"""The command line: `python main.py fit|validate|test|predict --config FILE`."""

from ddim_pl.cli_errors import exit_if_callbacks_are_shadowed

if __name__ == "__main__":
    exit_if_callbacks_are_shadowed()

    from ddim_pl.cli import main

    main()
