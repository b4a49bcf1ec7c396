# SPDX-License-Identifier: Apache-2.0
"""Images in one zip file per split, the format of Swin Transformer and MS-MLP for ImageNet.

    train.zip, val.zip              image files; tools/make_zip.py stores them uncompressed
    train_map.txt, val_map.txt      a line per image: name in the archive, TAB, label; further fields are ignored

A data set with label maps has these in the archive, too, and its lines are: image, TAB, label map. The member MAPS describes the
values of the maps, see datasets/packed_maps.py.

Samples are in the order of the map. The positions of all members are read once into arrays that worker processes share. An
image then needs two positional reads (`pread`), so that workers can share the file handle.
"""

from __future__ import annotations

import os
import struct
import weakref
import zipfile
import zlib
from collections.abc import Callable, Collection, Sequence

import numpy as np

from datasets.bands import ARRAY
from datasets.classes import ClassTable
from datasets.dataset import EncodedStorage, Images, packed
from datasets.folder import data_path, read_lines, read_listing
from datasets.images import EXTENSIONS, MAX_FILE, UnreadableImage
from datasets.packed_maps import packed_dataset, read_description
from datasets.registry import register_dataset
from utils.errors import UserError
from utils.files import open_regular

MAPS = '__label_maps__.json'  # member that describes the label maps, if there are some
_LOCAL_HEADER = struct.Struct('<4s22xHH')  # signature, lengths of the name and of the extra field
_ENCRYPTED = 1  # bit of a member's flags
_QUOTED = 200  # characters of a line in a message
_HINT = '`python tools/make_zip.py` writes it'


@register_dataset('zip')
def build_zip(config, split: str) -> Images:
    """Zip file `DATA_PATH/<split>.zip` with the map `DATA_PATH/<split>_map.txt`."""
    archive, listing = zip_paths(data_path(config), split)
    known = read_directory(archive)
    if MAPS in known:
        return _with_maps(config, archive, listing, known)
    listed = read_listing(listing, _name_and_label, "'name<TAB>label'", _HINT, config.MODEL.NUM_CLASSES)
    return listed.dataset(_storage(archive, known, listed.names, listed.where))


def _with_maps(config, archive: str, listing: str, known: dict[str, zipfile.ZipInfo]) -> Images:
    description, numbers, pairs = _read_member(archive, known[MAPS]), [], []
    for number, line in read_lines(listing, _HINT):
        numbers.append(number)
        pairs.append(line.rstrip('\r\n').split('\t'))
        if len(pairs[-1]) != 2:
            raise UserError(f"{listing}:{number}: expected 'image<TAB>label map', not {line.strip()[:_QUOTED]!r}.")
    images, maps = (
        _storage(archive, known, [pair[column] for pair in pairs], lambda index: f'{listing}:{numbers[index]}')
        for column in (0, 1)
    )
    return packed_dataset(config, images, maps, archive, description)


def _storage(
    archive: str, known: dict[str, zipfile.ZipInfo], names: Collection[str], where: Callable[[int], str]
) -> ZipStorage:
    """Build a storage of the members `names`. Raises UserError for a name that is missing, with file and line by `where`."""
    members = []
    for index, name in enumerate(names):
        if not name.lower().endswith((*EXTENSIONS, ARRAY)):
            raise UserError(f"{where(index)}: '{name}' is not an image by its name ({' '.join(EXTENSIONS)}).")
        if name.strip('/') not in known:
            raise UserError(f"{where(index)}: '{name}' is not in '{archive}'; do the two belong together?")
        members.append(known[name.strip('/')])
    return ZipStorage(archive, names, members)


def _read_member(archive: str, member: zipfile.ZipInfo) -> bytes:
    try:
        return ZipStorage(archive, [member.filename], [member]).read(0)
    except UnreadableImage as error:
        raise UserError(f"'{archive}@/{member.filename}': {error}; copy or write the archive again.") from None


def packed_classes(root: str) -> ClassTable | None:
    """Return the classes of an archive in `root`; None if no archive has label maps."""
    for archive, _ in (zip_paths(root, split) for split in ('train', 'val')):
        known = read_directory(archive) if os.path.isfile(archive) else {}
        if MAPS in known:
            return read_description(_read_member(archive, known[MAPS]), archive)[0]
    return None


def zip_paths(root: str, split: str) -> tuple[str, str]:
    """Return the paths of archive and map of a split."""
    return os.path.join(root, f'{split}.zip'), os.path.join(root, f'{split}_map.txt')


def _name_and_label(line: str) -> list[str]:
    name, *rest = line.rstrip('\r\n').split('\t')[:2]
    return [name, *(field.strip() for field in rest)]


def read_directory(archive: str) -> dict[str, zipfile.ZipInfo]:
    """Return the members of an archive by name.

    Raises:
        UserError: the file is missing, damaged, or no zip file.
    """
    try:
        with open_regular(archive) as content, zipfile.ZipFile(content) as file:
            members = {member.filename: member for member in file.infolist()}
    except FileNotFoundError:
        raise UserError(f"'{archive}' does not exist; {_HINT}, or give another -data_path.") from None
    except OSError as error:
        raise UserError(f"cannot read '{archive}': {error.strerror or error}.") from None
    except Exception as error:  # a damaged directory can raise any exception
        raise UserError(f"'{archive}' is damaged or no zip file: {error}; copy or write it again.") from None
    size = os.path.getsize(archive)
    for member in members.values():
        if not 0 <= member.header_offset <= size - member.compress_size or member.file_size >= 1 << 63:
            raise UserError(f"'{archive}' is cut off within '{member.filename}'; copy or write it again.")
    return members


class ZipStorage(EncodedStorage):
    """Members of a zip file, stored or deflated."""

    def __init__(self, archive: str, names: Collection[str], members: Sequence[zipfile.ZipInfo]):
        self.archive = archive
        self._names = packed(names)
        fields = ('header_offset', 'compress_size', 'file_size', 'CRC', 'compress_type', 'flag_bits')
        columns = [np.array([getattr(member, field) for member in members], np.int64) for field in fields]
        self._members = np.stack(columns, axis=1)
        self._handle = os.open(archive, os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)

    def __len__(self) -> int:
        return len(self._names)

    def describe(self, index: int) -> str:
        return f'{self.archive}@/{self._names[index].strip("/")}'

    def read(self, index: int) -> bytes:
        offset, stored_size, size, checksum, method, flags = self._members[index].tolist()
        if max(size, stored_size) > MAX_FILE:
            raise UnreadableImage(
                f'the member has {max(size, stored_size)} bytes, more than the {MAX_FILE} that are read'
            )
        if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or flags & _ENCRYPTED:
            raise UnreadableImage('the member is encrypted or compressed by another method than deflate')
        try:
            signature, *lengths = _LOCAL_HEADER.unpack(self._read(offset, _LOCAL_HEADER.size))
            data = self._read(offset + _LOCAL_HEADER.size + sum(lengths), stored_size)
            if method == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size or 1)  # 0 would mean any size
        except (struct.error, zlib.error) as error:
            raise UnreadableImage(f'the archive is damaged here ({error})') from None
        if signature != b'PK\3\4' or len(data) != size or zlib.crc32(data) != checksum:
            raise UnreadableImage('the archive is damaged here (the member does not match its checksum)')
        return data

    def _read(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._handle, size, offset)
        except OSError as error:
            raise UnreadableImage(error.strerror or str(error)) from None
