"""Checkpoints on an object store, copied to this machine's disk before they are opened.

Weights are read by memory mapping, which wants a file. A copy is kept in the user's cache under the
address and what the store says of each object, so that an object that was changed is another copy.
"""

from __future__ import annotations

import os
import pathlib
import uuid

import fsspec

from karploop.errors import UserError
from karploop.files import cache_folder, copy, fsync_directory
from karploop.manifest import digest

_ENDINGS = (".safetensors", ".json", ".jinja", ".model", ".txt")  # of a checkpoint's files


def fetched(address: str) -> pathlib.Path:
    """The local copy of a folder or .gguf file at an address such as gs://bucket/model.

    A file is copied once, and has its name when it is whole.

    Raises:
      UserError: no store of that kind, or nothing there.
    """
    address = address.rstrip("/")
    try:
        filesystem, place = fsspec.core.url_to_fs(address)
        if address.endswith(".gguf"):
            found = [place]
        else:
            entries = filesystem.ls(place, detail=True)
            files = [entry["name"] for entry in entries if entry["type"] == "file"]
            found = [name for name in files if name.endswith(_ENDINGS)]
        marks = {name.rpartition("/")[2]: filesystem.ukey(name) for name in sorted(found)}
    except (ImportError, ValueError) as error:  # a package is missing, or there is no such kind
        raise UserError(f"no model at '{address}': {error}") from error
    except OSError as error:
        raise UserError(
            f"no model at '{address}' ({error}): name a folder of an object store, or a .gguf file "
            "there, that this machine may read"
        ) from error
    folder = cache_folder() / "checkpoints" / digest([address, marks])[:32]
    folder.mkdir(parents=True, exist_ok=True)
    scheme = address.partition("://")[0]
    for name in found:
        target = folder / name.rpartition("/")[2]
        if not target.exists():
            partial = folder / f".{target.name}.{uuid.uuid4().hex}.tmp"
            try:
                copy(f"{scheme}://{name.removeprefix(f'{scheme}://')}", partial)
                os.replace(partial, target)
            finally:
                partial.unlink(missing_ok=True)
    fsync_directory(folder)
    return folder / place.rpartition("/")[2] if address.endswith(".gguf") else folder
