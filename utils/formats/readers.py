# SPDX-License-Identifier: Apache-2.0
"""Reader of weight files as plain data; the content of a file decides its format."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Callable
from typing import IO, Any

from utils.errors import UserError
from utils.files import open_regular
from utils.formats import array_files, paddle_files, torch_files
from utils.formats.foreign_files import foreign_kind
from utils.formats.pickles import RefusedError
from utils.text import NAME, printable

PADDLE, TORCH, OLD_TORCH = 'PaddlePaddle', 'PyTorch', 'PyTorch (before 1.6)'
SAFETENSORS, NPZ = 'safetensors', 'npz'
DETECTRON2 = 'detectron2'  # a pickle of arrays in PyTorch's layouts


def read_file(path: str) -> Any:
    """Read a weight file or checkpoint as plain data: containers, numbers, text and numpy arrays.

    Formats: Paddle (.pdparams, .pdopt), PyTorch (`torch.save` of any version; PyTorch is not needed), .safetensors,
    .npz and detectron2's .pkl. bfloat16 becomes float32, except in Paddle's files, which hold it as uint16 bits.

    Raises:
        UserError: the file cannot be read, is damaged, or holds more than data; the text names the file.
    """
    with _errors_of(path), open_regular(path) as file:
        return _READERS[_format_of(file, path)](file, os.path.getsize(path))


def file_format(path: str) -> str:
    """Return PADDLE, DETECTRON2, TORCH, OLD_TORCH, SAFETENSORS or NPZ by the content; DETECTRON2 by the suffix .pkl.

    Raises:
        UserError: as `read_file`.
    """
    with _errors_of(path), open_regular(path) as file:
        return _format_of(file, path)


def _format_of(file: IO[bytes], path: str) -> str:
    foreign = foreign_kind(file, path)
    if foreign:
        raise UserError(f"'{path}' is damaged, cut short, or not a weight file: it is {foreign[0]}; {foreign[1]}.")
    file.seek(0)
    head, size = file.read(64), os.path.getsize(path)
    if head.startswith(b'PK'):
        with zipfile.ZipFile(file) as archive:
            return TORCH if any(map(torch_files.is_object, archive.namelist())) else NPZ
    if str(path).endswith('.safetensors') or (head[8:9] == b'{' and int.from_bytes(head[:8], 'little') <= size):
        return SAFETENSORS
    if torch_files.LEGACY_MAGIC.to_bytes(10, 'little') in head[:32]:
        return OLD_TORCH
    return DETECTRON2 if str(path).lower().endswith('.pkl') else PADDLE


@contextlib.contextmanager
def _errors_of(path: str):
    """Turn every error of the block into a UserError; a damaged file can raise any exception."""
    try:
        yield
    except UserError:
        raise
    except RefusedError as error:
        raise UserError(f"'{path}' is refused: {_one_line(error)}.") from None
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror or error}.") from None
    except Exception as error:
        raise UserError(
            f"'{path}' is damaged, cut short, or not a weight file: {_one_line(error)}; copy or download it again."
        ) from None


def _one_line(error: Exception) -> str:
    """Return the text of an error in one short line, without control characters that it may quote from the file."""
    return printable(' '.join(str(error).split()), NAME).rstrip('.') or type(error).__name__


_READERS: dict[str, Callable[[IO[bytes], int], Any]] = {
    PADDLE: paddle_files.read,
    DETECTRON2: paddle_files.read,
    TORCH: torch_files.read_archive,
    OLD_TORCH: torch_files.read_legacy,
    SAFETENSORS: array_files.read_safetensors,
    NPZ: array_files.read_npz,
}
