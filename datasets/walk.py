# SPDX-License-Identifier: Apache-2.0
"""Search for image files below a folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

from datasets.images import EXTENSIONS
from utils.errors import UserError

# Folders of operating systems and NAS devices for thumbnails, copies and deleted files.
_SYSTEM_FOLDERS = {'__MACOSX', '@eaDir', '@Recycle', '#recycle', '$RECYCLE.BIN', 'System Volume Information'}
_SHOWN = 5  # extensions in a message


def folders_in(folder: str) -> list[str]:
    """Return the sorted names of the folders in `folder`. Raises UserError."""
    real = os.path.realpath(folder)
    return [entry.name for entry in _entries(folder) if _is_folder(entry, real)]


def images_below(folder: str, name: str = '', extensions: tuple[str, ...] = EXTENSIONS) -> tuple[list[str], Counter]:
    """Find the image files below `folder/name`, recursively.

    Each folder is read once, even if several symbolic links point to it. Links to a parent folder are not followed.

    Args:
        extensions: of image files, see `datasets.bands.image_extensions`.

    Returns:
        Paths relative to `folder` in the order of torchvision's ImageFolder, and the number of other files by extension.

    Raises:
        UserError: a folder cannot be read.
    """
    paths, left_out = [], Counter()
    for directory, files in sorted(_folders(os.path.join(folder, name))):
        relative = os.path.relpath(directory, folder)
        for file in sorted(files):
            if file.lower().endswith(extensions):
                paths.append(os.path.join(relative, file))
            else:
                left_out[os.path.splitext(file)[1].lower()] += 1
    return paths, left_out


def _folders(top: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder from `top` on with the names of its files; folders come before links to them."""
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
    """Return the entries of a folder, sorted by name, without hidden and system folders. Raises UserError."""
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith('.') and entry.name not in _SYSTEM_FOLDERS]
    except OSError as error:
        raise UserError(f"cannot read the folder '{folder}' ({error.strerror}); check DATA.DATA_PATH.") from None
    return sorted(found, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry, parent: str) -> bool:
    """Return True for a folder, or a link to a folder that is no parent of the entry; `parent`: real path of its folder."""
    if not entry.is_symlink():
        return entry.is_dir()
    real = os.path.realpath(entry.path)
    return os.path.isdir(real) and os.path.commonpath([real, parent]) != real


def _is_file(entry: os.DirEntry) -> bool:
    """Return True for a file or a broken link, which is a missing image; False for pipes and devices."""
    if not entry.is_symlink():
        return entry.is_file()
    return os.path.isfile(entry.path) or not os.path.exists(entry.path)


def describe_left_out(left_out: Counter, folder: str) -> str:
    """Describe skipped files, which have no image extension, in one sentence; '' if there are none."""
    if not left_out:
        return ''
    kinds, total = describe_counts(left_out), sum(left_out.values())
    return f"left out below '{folder}', not images by their extensions: {kinds} ({total} in all)."


def describe_counts(extensions: Counter) -> str:
    """Format counts such as '12 .heic, 1 .txt', most frequent first."""
    kinds = [f'{count} {extension or "without extension"}' for extension, count in extensions.most_common(_SHOWN)]
    rest = sum(extensions.values()) - sum(count for _, count in extensions.most_common(_SHOWN))
    return ', '.join(kinds + ([f'{rest} of other kinds'] if rest else []))
