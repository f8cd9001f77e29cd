"""Damaged files: noticed by checksums, and named with what to do.

A checkpoint is a zip archive, which holds a checksum of each member. JSON and safetensors files
get a digest of their content, under `SEAL`; files of before have none and are read without.
"""

import hashlib
import json
import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

SEAL = "sha256"
"""Where a file holds the digest of the rest."""

KNOWN = {
    r"TorchScript archives": "it is a program of TorchScript, not a file of weights",
    r"GLOBAL ([\w.]+)": "it names {}, which a file of weights may not",
    r"Weights only load failed": "torch.save has not written it",
    r"^KeyError: \d+$|^IndexError: (?:pop from empty list|(?:list )?index out of range)$"
    r"|^error: unpack requires|Invalid magic number": "torch.save has not written it",
    r"PytorchStreamReader failed": "a part of it is missing or damaged",
    r"inline_container|hasRecord|^RuntimeError: mmap can only": "it is a zip archive of others",
    r"^BadZipFile: File is not a zip": "it is no zip archive, or the end of one is missing",
    r"^EOFError|unexpected EOF|data was truncated|^SafetensorError: .*(?:header too small"
    r"|incomplete metadata|invalid header length)": "it is empty, or its end is missing",
    r"^SafetensorError: .*header": "it is no file of safetensors",
    r"^UnpicklingError: (an? .*)": "it holds {}",
    r"^UnpicklingError|^MemoryError|^OverflowError: (?:FRAME|BIN)|unregistered extension code": (
        "it is no pickle"
    ),
    r"invalid literal for int|could not convert string to": "it holds no number where there "
    "should be one",
    r"^JSONDecodeError: .*(line \d+ column \d+)": "it is no JSON from {} on",
    r"^UnicodeDecodeError": "it holds no text where there should be one",
    r"^OfflineModeIsEnabled|offline mode is enabled": "the Hub is not asked",
    r"^LocalEntryNotFoundError": "the Hub cannot be reached",
    r'Missing key\(s\) in state_dict: "([^"]+)"': "it has no weight {}",
    r'Unexpected key\(s\) in state_dict: "([^"]+)"': "its weight {} is not known",
    r"size mismatch for ([\w.]+):": "its weight {} has another shape",
}
"""What libraries say at length, or in their own words alone, and what that means."""


LONGEST = 200
"""Letters of a reason."""


class DamagedError(ValueError):
    """A file does not hold what was written."""


class _Kept(NamedTuple):
    """What was read of a file, and what tells that it is still the same file."""

    stamp: tuple[int, ...]
    content: Any


_kept: _Kept | None = None


def read_archive(path: str | Path, name: str = "checkpoint_path", *, keep: bool = False) -> Any:
    """Read what `torch.save` wrote; tensors stay on the disk until they are used.

    Its checksums are compared first, at more than a gigabyte a second.

    Args:
        path: The file.
        name: The argument that gave the path, for the error.
        keep: Whether the next call for the same file, unless it has changed, returns the same
            object; a `check_archive` of it compares no more checksums. The caller leaves the
            object as it is.

    Raises:
        DamagedError: If the file is damaged, or of another program.
    """
    global _kept
    kept = _take_kept(path)
    if kept is None:
        stamp = _stamp(path)
        check_archive(path, name)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # the bytes may name anything
            raise DamagedError(_no_checkpoint(path, name, reason_of(error))) from error
        kept = _Kept(stamp, content)
    if keep:
        _kept = kept
    return kept.content


def _take_kept(path: str | Path) -> _Kept | None:
    """What is kept of this very file; nothing is kept any more after that."""
    global _kept
    kept, _kept = _kept, None
    return kept if kept and kept.stamp and kept.stamp == _stamp(path) else None


def _stamp(path: str | Path) -> tuple[int, ...]:
    """What changes when a file is written or replaced; empty if there is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def check_archive(path: str | Path, name: str = "ckpt_path") -> None:
    """Compare the checksums of what `torch.save` wrote.

    Args:
        path: The file.
        name: The argument that gave the path, for the error.

    Raises:
        DamagedError: If the file is damaged, or of another program.
    """
    damage = None if _take_kept(path) else _damage_of(path)
    if damage is not None:
        raise DamagedError(_no_checkpoint(path, name, damage))


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Content of a JSON file with its digest, for `read_sealed`."""
    return {**content, SEAL: _digest_of_json(content)}


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a JSON file whose content was `sealed`, without the digest.

    Raises:
        DamagedError: If it cannot be read, holds no object, or does not match its digest.
    """
    try:
        content = json.loads(path.read_text())
        seal = content.pop(SEAL, None)
        damaged = seal is not None and seal != _digest_of_json(content)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path} cannot be read ({reason_of(error)})") from error
    if damaged:
        raise DamagedError(
            f"{path} cannot be read (its content does not match its {SEAL}, which is to be "
            "removed if the content was changed by hand)"
        )
    return content


def seal_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Metadata of a safetensors file: the digest of its tensors, for `read_tensors`."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return {SEAL: digest.hexdigest()}


def read_tensors(path: str | Path, *, needs_seal: bool = False) -> dict[str, Tensor]:
    """Read a safetensors file that was saved with `seal_of` its tensors as metadata.

    Args:
        path: The file.
        needs_seal: Whether a file without digest, as of before, is refused.

    Raises:
        DamagedError: If it cannot be read, or does not match its digest.
    """
    try:
        with safe_open(path, "pt") as file:
            seal = (file.metadata() or {}).get(SEAL)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # the bytes may say anything
        raise DamagedError(f"{path} cannot be read ({reason_of(error)})") from error
    if (needs_seal or seal is not None) and seal != seal_of(tensors)[SEAL]:
        raise DamagedError(f"{path} cannot be read (its tensors do not match their {SEAL})")
    return tensors


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a file of weights of others, safetensors or of `torch.save`; no code of it is run.

    Args:
        path: The file.

    Raises:
        DamagedError: If it cannot be read, or holds anything but tensors by name.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a program of TorchScript
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the bytes may say anything
        raise DamagedError(f"{path} cannot be read ({reason_of(error)})") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise DamagedError(
            f"{path} cannot be read (it holds a {type(content).__name__} in place of tensors by "
            "name)"
        )
    for name, each in content.items():
        if not isinstance(each, Tensor):
            raise DamagedError(
                f"{path} cannot be read (its {name[:60]!r} is a {type(each).__name__} in place of "
                "a tensor)"
            )
    return content


def reason_of(error: Exception) -> str:
    """What an error says, in one short line."""
    if isinstance(error, DamagedError):
        return str(error)
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    for pattern, meaning in KNOWN.items():
        found = re.search(pattern, text)
        if found:
            return meaning.format(*(each[:LONGEST] for each in found.groups()))
    return text[:LONGEST]


def _digest_of_json(content: Mapping[str, Any]) -> str:
    # As it will be read: keys become texts, and tuples lists.
    plain = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _damage_of(path: str | Path) -> str | None:
    """What is wrong with a zip archive, or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
    except Exception as error:  # zipfile raises a dozen kinds
        return reason_of(error)
    return None if member is None else f"{member!r} does not match its checksum"


def _no_checkpoint(path: str | Path, name: str, reason: str) -> str:
    """The message on a checkpoint, with a whole one that lies beside it, if there is one."""
    beside = [each for each in Path(path).parent.glob("*.ckpt") if each.is_file()]
    beside = [each for each in beside if each.name != Path(path).name]
    beside.sort(key=lambda each: each.stat().st_mtime, reverse=True)
    whole = next((each for each in beside if _damage_of(each) is None), None)
    hint = "" if whole is None else f", such as {whole}, which is whole"
    return (
        f"{name} must be a checkpoint, got {path}, which is damaged or of another program "
        f"({reason}): give another file{hint}"
    )
