# SPDX-License-Identifier: Apache-2.0
"""Image files below a folder: which files count, and which are left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

from datasets.images import EXTENSIONS
from utils.errors import UserError

# Thumbnails, copies and deleted files that systems keep beside pictures under names that are not hidden.
_SYSTEM_FOLDERS = {'__MACOSX', '@eaDir', '@Recycle', '#recycle', '$RECYCLE.BIN', 'System Volume Information'}
_SHOWN = 5  # extensions in a message


def folders_in(folder: str) -> list[str]:
    """Sorted names of the folders in `folder`. Raises UserError."""
    real = os.path.realpath(folder)
    return [entry.name for entry in _entries(folder) if _is_folder(entry, real)]


def images_below(folder: str, name: str = '') -> tuple[list[str], Counter]:
    """Image files anywhere below `folder/name`.

    Returns:
        Their paths relative to `folder`, in the order of torchvision's ImageFolder, and the number of other files by
        extension. Each folder is read once, however many symbolic links lead to it; links to a folder that they lie in are
        not followed.

    Raises:
        UserError: a folder that cannot be read.
    """
    paths, left_out = [], Counter()
    for directory, files in sorted(_folders(os.path.join(folder, name))):
        relative = os.path.relpath(directory, folder)
        for file in sorted(files):
            if file.lower().endswith(EXTENSIONS):
                paths.append(os.path.join(relative, file))
            else:
                left_out[os.path.splitext(file)[1].lower()] += 1
    return paths, left_out


def _folders(top: str) -> Iterator[tuple[str, list[str]]]:
    """Yields each folder from `top` on, with the names of its files that count; folders before links to them."""
    seen, plain, links = set(), [top], []
    while plain or links:
        directory = plain.pop() if plain else links.pop(0)
        real = os.path.realpath(directory)
        if real in seen:
            continue
        seen.add(real)
        entries = _entries(directory)
        folders = [entry for entry in entries if _is_folder(entry, real)]
        plain += [entry.path for entry in folders if not entry.is_symlink()]
        links += [entry.path for entry in folders if entry.is_symlink()]
        yield directory, [entry.name for entry in entries if _is_file(entry)]


def _entries(folder: str) -> list[os.DirEntry]:
    """Entries of a folder that are neither hidden nor a system's own, sorted by name. Raises UserError."""
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith('.') and entry.name not in _SYSTEM_FOLDERS]
    except OSError as error:
        raise UserError(f"cannot read the folder '{folder}' ({error.strerror}); check DATA.DATA_PATH.") from None
    return sorted(found, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry, parent: str) -> bool:
    """Whether an entry of the folder with the real path `parent` is one, or a link to one that it does not lie in."""
    if not entry.is_symlink():
        return entry.is_dir()
    real = os.path.realpath(entry.path)
    return os.path.isdir(real) and os.path.commonpath([real, parent]) != real


def _is_file(entry: os.DirEntry) -> bool:
    """Whether an entry is a file, or a link to none, which is a missing image. Pipes and devices are not."""
    if not entry.is_symlink():
        return entry.is_file()
    return os.path.isfile(entry.path) or not os.path.exists(entry.path)


def describe_left_out(left_out: Counter, folder: str) -> str:
    """One sentence on the files that are no images by their names, empty where there are none."""
    if not left_out:
        return ''
    kinds, total = describe_counts(left_out), sum(left_out.values())
    return f"left out below '{folder}', not images by their extensions: {kinds} ({total} in all)."


def describe_counts(extensions: Counter) -> str:
    """'12 .heic, 1 .txt', the most frequent first."""
    kinds = [f'{count} {extension or "without extension"}' for extension, count in extensions.most_common(_SHOWN)]
    rest = sum(extensions.values()) - sum(count for _, count in extensions.most_common(_SHOWN))
    return ', '.join(kinds + ([f'{rest} of other kinds'] if rest else []))
