"""Folders of diffusers on the Hugging Face Hub, by its own client."""

from pathlib import Path

from ddim_pl.damage import reason_of
from ddim_pl.teachers.diffusers_folder import CONFIG, PIPELINE, SCHEDULER, WEIGHTS


def download(name: str) -> Path:
    """The folder of a repository, with the files that are read, downloaded once.

    Without a network it is what was downloaded before.

    Args:
        name: `owner/name`.

    Raises:
        ValueError: If the client is not installed, there is no such repository, or the files are
            not here and cannot be downloaded.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            f"source {name!r} is no file or folder; as a name on the Hugging Face Hub it needs "
            "the package huggingface_hub, which is not installed: pip install "
            "'ddim_pl[diffusers]'"
        ) from None
    try:
        files = wanted(huggingface_hub.list_repo_files(name))
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except huggingface_hub.errors.RepositoryNotFoundError:
        raise ValueError(
            f"source must be a file, a folder or a name on the Hugging Face Hub, got {name!r}: "
            "there is no such public repository"
        ) from None
    except Exception as error:  # of the client or of what it connects with
        reason = reason_of(error)
    remedy = "HF_HUB_OFFLINE=1 says so without a wait; on"
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        reason, remedy = "HF_HUB_OFFLINE is set", "unset it, or on"
    try:
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except Exception:
        raise ValueError(
            f"source {name!r} is no folder here and cannot be downloaded ({reason}): {remedy} a "
            f"machine with a network put its {PIPELINE}, {CONFIG}, {SCHEDULER} and "
            f"{WEIGHTS[0]} (or {WEIGHTS[1]}) into a folder, laid out as in the repository, and "
            "give that folder as the source"
        ) from None


def wanted(files: list[str]) -> list[str]:
    """Of the files of a repository, those that are read: one of weights, and the configs."""
    found = [each for each in files if each == PIPELINE]
    for place in ("", "unet/", "scheduler/"):
        found += [f"{place}{each}" for each in (CONFIG, SCHEDULER) if f"{place}{each}" in files]
        weights = [f"{place}{each}" for each in WEIGHTS if f"{place}{each}" in files]
        found += weights[:1]
    return found
