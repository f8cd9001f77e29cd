"""What went wrong on the command line, in one line that says what to do.

PyTorch and Lightning are imported where a message needs them: one about the command does not.
"""

import difflib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ddim_pl.renamed import RENAMED
from ddim_pl.shipped import CONFIGS, config_name

OURS, FEATURES = ("ddim_pl.", "callbacks."), ("ddim_pl.metrics.",)
MOST_NAMES = 12
"""Names that a message lists at most."""

PACKAGES = ("ddim_pl/", "callbacks/")
"""Where the code of this project lies, beside each other."""

LISTS = "--help and --print_config list what there is"
HELP_LISTS = "--help lists what there is"
FULL = r"os error \d+|No space left|PytorchStreamWriter failed"
"""What the writers of tensors say where others raise an OSError."""

WORKER_FAILED = r"Caught \w+ in DataLoader worker process \d+\."
WORKER_DIED = r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)"
PEER_DIED = r"gloo|Connection (closed|reset) by peer|NCCL|TCPStore"
"""What libraries say when another process is gone."""

UNKNOWN = r"unrecognized arguments: (-[\w.+-]+)"
KEY, OWNER = r'Parser key "([\w.]+)":', r"Problem with given class_path '([\w.]+)':"
WRONG_CLASS = (
    r"Expected a dot import path string: (\S+)|module '?[\w.]+'? has no attribute '(\w+)'"
    r"|No module named '[\w.]+'"
)
WRONG_VALUE = (
    r"(?:Got|Given) value: (?!NestedArg)(.*?)"
    r"(?:\. Got value: Namespace\(class_path='([\w.]+)'.*)?$"
)
NO_LIST = r"Expected a <class '(?:collections\.abc\.\w+|list|tuple)'>"
NO_FILE = r"""Parser key "config": (?:File does not exist|Path is not a file): '(.*)'"""

MOST_FILES = 4
"""Files that a message names at most."""

NOISE = (
    *("- Does not validate", "- Expected a <class 'NoneType'>"),
    # A list of loggers is tried as a single one, too.
    *("- Not a valid subclass of Logger. Got value: [", "- a class path (str)", "- a dict with"),
)
"""Lines of nested text that are no reasons."""

WORDS = {int: ("an integer", "integers"), float: ("a number", "numbers"), str: ("a text", "texts")}
"""What types are called: of one value, and of several."""


def parser_message(
    message: str,
    types: Mapping[str, Any] = MappingProxyType({}),
    known: Sequence[str] = (),
) -> str:
    """Say what is wrong with the arguments, in one line.

    Args:
        message: What jsonargparse says: nested text, each level a key or a class, the reason last.
        types: Annotations of the command's own arguments, by their names.
        known: The command's own options, such as "--trainer.max_steps".
    """
    unknown = re.match(UNKNOWN, message)
    close = _close_option(unknown[1], known) if unknown else None
    if close is not None:
        return f"{one_line(message)}: did you mean {close}?"
    lists = LISTS if not known or "--print_config" in known else HELP_LISTS
    missing = re.search(NO_FILE, message)
    if missing:
        return _no_config(Path(missing[1]))
    option = re.search(r"Option '([\w.]+)' is not accepted", message)
    value = re.search(WRONG_VALUE, message, re.MULTILINE)
    # What comes after a wrong value are other classes that were tried in vain.
    if option and not (value and value.start() < option.start()):
        owner = _last(OWNER, message[: option.start()])
        kind = _imported(owner) if owner else None
        name = owner.rpartition(".")[2] if owner else "this command"
        hint = _hint(option[1].partition(".")[0], _arguments(kind)) if kind else lists
        return f"{option[1]} is no argument of {name}: {hint}"
    wrong = re.search(WRONG_CLASS, message)
    if wrong:
        line = _wrong_class(message, wrong, types)
        if line is not None:
            return line
    line = _wrong_value(message, value, types) if value else None
    if line is not None:
        return line
    reason, key = one_line(_reason(message)).rstrip("."), _last(KEY, message)
    if key is not None and "Parser key" not in reason:
        reason = f"{key}: {reason}"
    return f"{reason} ({lists})"


def _close_option(given: str, known: Sequence[str]) -> str | None:
    """The option that may be meant: one of these, or one below a name that is among them."""
    heads = {name.partition(".")[0] for name in known if name.startswith("--")}
    head, dot, rest = given.partition(".")
    if dot and head not in heads:
        owner = difflib.get_close_matches(head, heads, n=1, cutoff=0.7)
        return f"{owner[0]}.{rest}" if owner else None
    begun = [name for name in known if name.startswith(given)]
    close = begun or difflib.get_close_matches(given, known, n=1, cutoff=0.7)
    return min(close, key=len, default=None)


def run_message(error: Exception, options: Iterable[tuple[str, str]] = ()) -> str:
    """Say what went wrong in a run; of an error that no check foresaw, also that it may be a bug.

    Args:
        error: Raised by the command.
        options: Names and values of the arguments, one of which may name a file that fails.
    """
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    message = one_line(_reason(_of_worker(str(error))))
    misfit = re.match(r"Error\(s\) in loading state_dict for \w+: ([^.:]*)", message)
    if isinstance(error, RuntimeError) and misfit:
        return (
            f"the checkpoint does not fit the configured network ({misfit[1].strip()}): give the "
            "config it was trained with, or none to use the checkpoint's own"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return _file_message(error, options)
    if re.search(FULL, message):
        return f"a file cannot be written ({message}): make room or give another place"
    if isinstance(error, ValueError | OSError | MisconfigurationException):
        return message
    if re.search(WORKER_DIED, message):
        return (
            f"a process that loads data has died ({message}): most often the memory was full: "
            "lower data.num_workers or data.batch_size"
        )
    if isinstance(error, RuntimeError) and re.search(PEER_DIED, message):
        return (
            f"another process of this run has ended ({message}): what it said itself tells why; "
            "a fit goes on from its last checkpoint by --ckpt_path last"
        )
    return (
        f"{type(error).__name__}: {message or 'no message'}: if no argument explains it, this is "
        "a bug: set DDIM_PL_TRACEBACK=1 to see where, and report it"
    )


def _of_worker(message: str) -> str:
    """Of an error within a process that loads data, what it says without its traceback."""
    if not re.match(WORKER_FAILED, message):
        return message
    lines = message.rstrip().splitlines()
    inner = max(i for i, line in enumerate(lines) if line.startswith("  ") or i == 0)
    return re.sub(r"^[\w.]+: ", "", " ".join(lines[inner + 1 :]))


def _file_message(error: OSError, options: Iterable[tuple[str, str]]) -> str:
    """A file that cannot be read or written, and the argument that says where it is."""
    file = os.fsdecode(error.filename or "a file")
    names = [
        name
        for name, value in options
        if value and (file.startswith(value) or value.startswith(f"{file}/"))
    ]
    argument = f"{names[-1].lstrip('-')}: " if names else ""
    reason = (error.strerror or type(error).__name__).lower()
    return f"{argument}{file} cannot be used ({reason}): make room or give another place"


def one_line(message: str) -> str:
    """The message without line breaks."""
    return " ".join(message.split())


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print each warning of this package as one line, once; those of others as Python does."""
    before, said = warnings.formatwarning, set[str]()
    root = Path(__file__).resolve().parents[1]
    ours = tuple(f"{root}/{each}" for each in PACKAGES)

    def formatted(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        if not str(Path(filename).resolve()).startswith(ours):
            return before(message, category, filename, lineno, line)
        text = f"warning: {one_line(str(message))}\n"
        is_new = text not in said
        said.add(text)
        return text if is_new else ""

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = before


def exit_if_callbacks_are_shadowed() -> None:
    """Exit with one line if another package called `callbacks` hides ours."""
    ours = Path(__file__).resolve().parents[1] / "callbacks"
    spec = find_spec("callbacks")
    places = [*(spec.submodule_search_locations or ()), spec.origin] if spec is not None else []
    found = Path(places[0]).resolve() if places and places[0] is not None else None
    if found != ours:
        sys.exit(
            f"error: the package callbacks must be {ours}, got {found or 'none'}: rename the "
            f"other one, or put {ours.parent} before it in PYTHONPATH"
        )


def known_classes(base: type[Any], packages: tuple[str, ...] = OURS) -> list[type[Any]]:
    """The classes below a base that can be made: ours, or if there are none, its package's."""
    from torch import nn

    kinds = [kind for kind in _below(base) if not inspect.isabstract(kind)]
    kinds = [kind for kind in kinds if not kind.__name__.startswith("_")]
    places = ("ddim_pl.networks.",) if (base, packages) == (nn.Module, OURS) else packages
    ours = [kind for kind in kinds if f"{kind.__module__}.".startswith(places)]
    # The parts of a network explain no arguments, nor do classes that no config names.
    ours = [kind for kind in ours if _explains_arguments(kind) or not _arguments(kind)]
    if packages == FEATURES:
        ours = [kind for kind in ours if hasattr(kind, "name")]  # not what an extractor is made of
    home = base.__module__.partition(".")[0]
    others = [kind for kind in kinds if kind.__module__.partition(".")[0] == home]
    return sorted(set(ours or others), key=lambda kind: kind.__name__)


def _explains_arguments(kind: type[Any]) -> bool:
    """Whether a class of ours, or the base of ours that has its arguments, explains them."""
    bases = [each for each in kind.__mro__ if f"{each.__module__}.".startswith(OURS)]
    return any("Args:" in (each.__doc__ or "") for each in bases)


def _reason(message: str) -> str:
    """Of nested text, the reason at its core."""
    if "Does not validate against any" not in message:
        return message
    lines = [line.strip() for line in message.splitlines()]
    reasons = [line for line in lines if line.startswith("- ") and not line.startswith(NOISE)]
    # What the right class says tells more than that a plain value would do too.
    reasons = [line for line in reasons if not line.startswith("- Expected a <class")] or reasons
    if not reasons:
        return message
    if not reasons[0].endswith(":"):
        return reasons[0].removeprefix("- ")
    # The class is right, one of its arguments is not: that stands below.
    inner = message.partition(reasons[0])[2].partition("- Expected a <class 'NoneType'>")[0]
    return _reason(inner)


def _no_config(file: Path) -> str:
    """A config that is no file, and those of a similar name, beside it or else of this project."""
    inside = sorted(file.glob("*.y*ml"))
    close = inside or _similar(file, file.parent.glob("*.y*ml"))
    close = close or _similar(file, CONFIGS.glob("*/*.yaml"))
    given, *names = [config_name(each) for each in (file, *close[:MOST_FILES])]
    hint = f"did you mean {' or '.join(names)}?" if names else f"{CONFIGS} has some"
    return f"config must be a file that exists, got {given}: {hint}"


def _similar(file: Path, known: Iterable[Path]) -> list[Path]:
    """Those files of the same or else a similar name, the most similar path first."""
    paths = list(known)
    stems = difflib.get_close_matches(file.stem, {each.stem for each in paths}, n=len(paths) or 1)
    stems = [file.stem] if file.stem in stems else stems
    names = [str(each) for each in paths if each.stem in stems]
    return [*map(Path, difflib.get_close_matches(str(file), names, len(names) or 1, cutoff=0))]


def _wrong_value(message: str, value: re.Match[str], types: Mapping[str, Any]) -> str | None:
    """A value that is none of those that its argument's annotation allows, if that tells them."""
    before, given = message[: value.start()], value[1]
    key = _last(KEY, before)
    hint = _annotation(before, key, types, value[2])
    allowed = _allowed(hint)
    if not allowed:
        return None
    remedy = ""
    choices = [str(each) for part in _parts(hint) for each in _choices(part)]
    close = difflib.get_close_matches(given, choices, n=1)
    if close:
        remedy = f": did you mean {close[0]}?"
    elif allowed[0].startswith("a list") and not given.startswith("["):
        one = re.search(NO_LIST, before[before.rfind("Parser key") :])
        remedy = f": write it as '[{given}]'" if one else " in it"
    return f"{key} must be {' or '.join(allowed)}, got {given}{remedy}"


def _allowed(hint: Any) -> list[str]:
    """The values that an annotation allows, in words; without the classes among them."""
    parts = _parts(hint)
    found = [WORDS[part][0] for part in parts if part in WORDS]
    found = [_list_of(part) for part in parts if _is_list(part)][:1] + found
    choices = {str(each): each for part in reversed(parts) for each in reversed(_choices(part))}
    if choices:
        shown = _some([repr(each) for each in reversed(choices.values())])
        found.append(f"one of {shown}" if len(choices) > 1 else shown)
    found += ["true or false"] if bool in parts else []
    return found + (["null"] if found and NoneType in parts else [])


def _parts(hint: Any) -> list[Any]:
    """The members of a union, or else its one type; float takes integers too."""
    if get_origin(hint) not in (Union, UnionType):
        return [hint]
    parts = [part for member in get_args(hint) for part in _parts(member)]
    return [part for part in parts if not (part is int and float in parts)]


def _choices(part: Any) -> tuple[Any, ...]:
    return get_args(part) if get_origin(part) is Literal else ()


def _is_list(part: Any) -> bool:
    kind = get_origin(part) or part
    return isinstance(kind, type) and kind is not str and issubclass(kind, tuple | Sequence)


def _list_of(part: Any) -> str:
    """A list in words, as in a list of 3 integers."""
    elements = get_args(part)
    fixed = get_origin(part) is tuple and Ellipsis not in elements
    words = [f"{len(elements)}"] if fixed else []
    words += [WORDS[each][1] for each in elements[:1] if each in WORDS] or ["entries"] * fixed
    return f"a list of {' '.join(words)}" if words else "a list"


def _wrong_class(message: str, wrong: re.Match[str], types: Mapping[str, Any]) -> str | None:
    """A value that names no class of the wanted kind."""
    from torch import Tensor

    before = message[: wrong.start()]
    key = _last(KEY, before)
    given = wrong[1] or _last(OWNER, before) or wrong[2]
    base = _base_of(before, key)
    if key is not None and base is Tensor:  # the learning rate of an optimiser
        return f"{key} must be a number, got {given}"
    if key is None or base is None:
        return None
    packages = FEATURES if key == "features" else OURS
    known = [kind.__name__ for kind in known_classes(base, packages)]
    names = {old.rpartition(".")[2]: _imported(new) for old, new in RENAMED.items()}
    now = names.get(given)
    if now is not None and issubclass(now, base):
        return f"{key} cannot be {given}: it is called {now.__name__} now"
    close = difflib.get_close_matches(given.rpartition(".")[2], known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    also = "".join(f", or {each}" for each in _allowed(_annotation(before, key, types)))
    return (
        f"{key} cannot be {given}: {hint}known are {_some(known)}, or any class by its full path"
        f"{also}"
    )


def _base_of(before: str, key: str | None) -> type[Any] | None:
    """The class that a key wants a subclass of: as the message says, or else its owner's hint."""
    tail = before[before.rfind("Parser key") :]
    for name in re.findall(r"[A-Za-z_][\w]*(?:\.\w+)+", _last(r"Subtypes: \[(.*)\]", tail) or ""):
        kind = _imported(name)
        if kind is not None and not name.startswith(("collections.", "torch.nn.parameter")):
            return kind
    found = _annotation(before, key, {})
    return found if isinstance(found, type) else None


def _annotation(
    before: str, key: str | None, types: Mapping[str, Any], owner: str | None = None
) -> Any:
    """The annotation of a key: of its owner's argument, or of the command's own."""
    path = owner or _last(OWNER, before)
    if path is None:
        return types.get(key or "")
    for each in (_imported(path) or object).__mro__[:-1]:
        maker = vars(each).get("__init__")
        try:
            hints = get_type_hints(maker) if maker is not None else {}
        except (NameError, TypeError):  # names that only a type checker imports
            continue
        if key in hints:
            return hints[key]
    return None


def _hint(name: str, names: Sequence[str]) -> str:
    names = [each for each in names if each != name]  # a base has it, this class fixes it
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]}?" if close else f"it has {_some(names) or 'none'}"


def _arguments(kind: type[Any]) -> list[str]:
    """Arguments of a class, those passed on to its bases included."""
    found: dict[str, None] = {}
    for each in kind.__mro__[:-1]:
        maker = vars(each).get("__init__")
        if maker is not None:
            found |= dict.fromkeys(inspect.signature(maker).parameters)
            if "kwargs" not in inspect.signature(maker).parameters:
                break
    return [name for name in found if name not in ("self", "args", "kwargs")]


def _imported(path: str) -> type[Any] | None:
    """A class that is imported already: a message may name what a stranger's checkpoint says."""
    module, _, name = path.rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    return kind if isinstance(kind, type) else None


def _below(base: type[Any]) -> Iterator[type[Any]]:
    yield base
    for child in type.__subclasses__(base):
        yield from _below(child)


def _last(pattern: str, text: str) -> str | None:
    found: Iterable[str] = re.findall(pattern, text)
    return next(reversed(list(found)), None)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MOST_NAMES])
    return f"{shown} and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else shown
