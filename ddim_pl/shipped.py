"""The configs that come with the package, found by name from any folder."""

from collections.abc import Sequence
from pathlib import Path

PACKAGED = Path(__file__).parent / "configs"
"""Where a wheel has them, see `setup.py`."""

CONFIGS = PACKAGED if PACKAGED.is_dir() else Path(__file__).parents[1] / "configs"


def with_shipped_configs(args: Sequence[str]) -> list[str]:
    """Arguments in which configs that are given by name are files, see `config_file`."""
    found = list(args)
    for place, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name not in ("-c", "--config"):
            continue
        if equals:
            found[place] = f"{name}={config_file(value)}"
        elif place + 1 < len(args):
            found[place + 1] = config_file(args[place + 1])
    return found


def config_file(name: str) -> str:
    """The file of a config: one of that path, or else a shipped one of that name.

    Args:
        name: A path, `digits/ddpm`, `digits/ddpm.yaml` or `configs/digits/ddpm.yaml`. Anything
            else, such as YAML, is returned as it is.
    """
    path = Path(name)
    if "\n" in name or ":" in name or path.is_absolute() or ".." in path.parts or path.exists():
        return name
    below = Path(*path.parts[1:]) if path.parts[:1] == (CONFIGS.name,) else path
    for file in (CONFIGS / below, CONFIGS / f"{below}.yaml"):
        if file.is_file():
            return str(file)
    return name


def config_name(file: Path) -> str:
    """What to call a config: a shipped one by its name if it does not lie below this folder."""
    if file.is_relative_to(Path.cwd()):
        return file.relative_to(Path.cwd()).as_posix()
    if file.is_relative_to(CONFIGS):
        return file.relative_to(CONFIGS).with_suffix("").as_posix()
    return file.as_posix()
