"""Reading a teacher, of whatever program, by looking at its source."""

import re
from pathlib import Path
from typing import Any

from ddim_pl.teachers.authors import is_authors, read_authors
from ddim_pl.teachers.base import Teacher, read_tensors_of
from ddim_pl.teachers.diffusers_folder import SUPPORTED, given_scheduler, read_folder
from ddim_pl.teachers.edm import read_edm
from ddim_pl.teachers.hub import download
from ddim_pl.teachers.persistence import is_persistence
from ddim_pl.teachers.scheduler import settings_of

HUB_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"


def read_source(
    source: str, scheduler: str | None = None, image_size: int | None = None
) -> Teacher:
    """Read a teacher.

    Args:
        source: A folder of diffusers, the name of one on the Hugging Face Hub, a file of weights
            of the code of DDIM or DDPM for PyTorch, or a pickle of EDM.
        scheduler: A `scheduler_config.json` of diffusers or its folder, in place of the source's.
        image_size: Height and width of the images, where the source does not say it.

    Raises:
        ValueError: If it is none of these, or cannot be expressed here; says what is supported.
    """
    path, given = Path(source), None if scheduler is None else Path(scheduler)
    if path.is_dir():
        return read_folder(path, given, image_size)
    if not path.exists():
        if not re.fullmatch(HUB_NAME, source):
            raise ValueError(
                f"source must be a folder, a file or a name on the Hugging Face Hub (owner/name), "
                f"got {source!r}, which is not there: give another"
            )
        return read_folder(download(source), given, image_size)
    if path.suffix == ".pkl" or is_persistence(path):
        _check_no_choice(source, scheduler=scheduler, image_size=image_size)
        return read_edm(path)
    content = read_tensors_of(path)
    _check_kind(content, source)
    settings = None if given is None else settings_of(given_scheduler(given))
    return read_authors(content, image_size, settings, source)


def _check_no_choice(source: str, **given: Any) -> None:
    """Check that nothing is chosen that a pickle of EDM says itself."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name} must be left out for a pickle of EDM, got {value!r}: {source!r} says it "
                "itself"
            )


def _check_kind(content: Any, source: str) -> None:
    """Check that a file of weights is of a kind that is known, and say of which it is."""
    if isinstance(content, list | tuple) or is_authors(content):
        return
    names = content if isinstance(content, dict) else {}
    hint = "it is of another program"
    if "hyper_parameters" in names:
        hint = "it is a checkpoint already, which every command takes as it is"
    elif "time_embedding.linear_1.weight" in names:
        hint = "give the folder that it lies in, with its config.json"
    raise ValueError(
        f"source must be a file of weights of the code of DDIM or DDPM, or a folder, got "
        f"{source!r}: {hint}; {SUPPORTED}, the files of weights of DDIM's code, "
        "and EDM's pickles"
    )
