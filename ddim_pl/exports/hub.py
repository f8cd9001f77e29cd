"""Putting an export on the Hugging Face Hub, by its own client."""

import re
from pathlib import Path
from typing import Any

from ddim_pl.damage import reason_of
from ddim_pl.teachers.reading import HUB_NAME


def check_hub(name: str) -> None:
    """Check, before anything is written, that the user can put something there.

    Args:
        name: `owner/name` of the repository.

    Raises:
        ValueError: If the client is not installed, the user is not logged in, or the Hub cannot be
            reached.
    """
    if not re.fullmatch(HUB_NAME, name):
        raise ValueError(f"push_to_hub must be owner/name, got {name!r}: give the owner too")
    hub = _client()
    try:
        hub.HfApi().whoami()
    except hub.errors.LocalTokenNotFoundError:
        raise ValueError(
            f"push_to_hub must be the name of a repository of a user who is logged in, got "
            f"{name!r}, but no token is here: run hf auth login, or set HF_TOKEN"
        ) from None
    except Exception as error:  # of the client or of what it connects with
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = (
            "its token is refused: run hf auth login"
            if status == 401
            else "export without push_to_hub, and put the folder there later by hf upload"
        )
        raise ValueError(
            f"push_to_hub {name!r} cannot be used ({reason_of(error)}): {remedy}"
        ) from None


def push(folder: Path, name: str) -> str:
    """Put the files of a folder into a repository, which is made if it is not there.

    Args:
        folder: The folder.
        name: `owner/name`.

    Returns:
        Where it is.

    Raises:
        ValueError: If that fails; the folder stays.
    """
    api = _client().HfApi()
    try:
        address = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder))
    except Exception as error:  # of the client or of what it connects with
        raise ValueError(
            f"push_to_hub {name!r} failed ({reason_of(error)}): the export is whole in {folder}; "
            f"try again by hf upload {name} {folder}"
        ) from None
    return str(address)


def _client() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            "push_to_hub needs the package huggingface_hub, which is not installed: pip install "
            "'ddim_pl[diffusers]'"
        ) from None
    return huggingface_hub
