# SPDX-License-Identifier: Apache-2.0
"""Published weights by the name of a configuration: download, verify, convert, keep in the cache.

`$LEANVIT_CACHE/weights/NAME/` holds the published file, and NAME.pdparams, its conversion. The URLs are in configs/zoo.csv.

- LEANVIT_MIRROR: URL before host and path of each file, such as http://mirror.lan/files for
  http://mirror.lan/files/dl.fbaipublicfiles.com/deit/...
- HF_ENDPOINT: replaces https://huggingface.co.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

from config import get_config
from models.registry import build_model, config_file
from models.weights.classes import match_classes
from models.weights.convert import port_with_report, rename_arrays
from models.zoo import PUBLISHED, Published
from utils.environment import user_cache
from utils.errors import UserError
from utils.formats import PADDLE, file_format, read_file, write_pdparams
from utils.locks import exclusive
from utils.transfer import check_file, download
from utils.weights import METADATA, choose_state_dict

_FILE = re.compile(r'\.(pth|pt|tar|bin|safetensors|npz|pdparams)$')
_HASH = re.compile(r'-([0-9a-f]{8,64})\.')  # torch.hub's convention: the first digits of the SHA-256 in the file name
_HIDDEN = ('.part', '.etag', '.lock')


def cache_folder(name: str) -> str:
    """Return the folder of the cache for the weights of a configuration."""
    return os.path.join(user_cache(), 'weights', name)


def fetch(name: str, log: Callable[[str], None] = print) -> str:
    """Return the .pdparams file of the published weights of a configuration; download and convert them if needed.

    Of several processes, one downloads, and all others wait for it.

    Raises:
        UserError: nothing is published, the download failed, or the file is not the published one.
    """
    config_file(name)
    published, folder = PUBLISHED.get(name, Published(name)), cache_folder(name)
    target = os.path.join(folder, f'{name}.pdparams')
    if os.path.isfile(target):
        return target
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to the cache '{folder}' ({error.strerror}); set LEANVIT_CACHE.") from None
    with exclusive(os.path.join(folder, 'download.lock'), log):
        if not os.path.isfile(target):  # another process may have written it
            convert(name, _source(published, folder, log), target, log)
    return target


def file_url(url: str) -> str:
    """Return the URL of the file behind the URL of the table; '': the table names only a page that links it."""
    parts = urlsplit(url)
    drive = re.search(r'/d/([\w-]+)', parts.path)
    file_id = drive[1] if drive else parse_qs(parts.query).get('id', [''])[0]
    if parts.netloc == 'drive.google.com' and file_id:
        return f'https://drive.usercontent.google.com/download?id={file_id}&export=download&confirm=t'
    if parts.netloc == 'huggingface.co':
        end = os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')
        file = '' if _FILE.search(parts.path) else '/resolve/main/model.safetensors'
        return f'{end}{parts.path.rstrip("/")}{file}'
    return url if _FILE.search(parts.path) else ''


def _mirrored(url: str) -> str:
    mirror, parts = os.environ.get('LEANVIT_MIRROR', '').rstrip('/'), urlsplit(url)
    return f'{mirror}/{parts.netloc}{parts.path}' if mirror else url


def _source(published: Published, folder: str, log: Callable[[str], None]) -> str:
    """Return the published file: one that is in the folder already, after a check, or a new one."""
    url = file_url(published.url)
    name = os.path.basename(urlsplit(url).path) or 'weights'
    sha256 = published.sha256 or (match[1] if (match := _HASH.search(name)) else '')
    given = sorted(file for file in os.listdir(folder) if not file.endswith(_HIDDEN))
    if given:
        path = os.path.join(folder, name if name in given else given[0])
        check_file(path, sha256, f"'{path}'")
        return path
    path = os.path.join(folder, name)
    if not published.url:
        raise UserError(f'no weights are published for {published.name}; train it, or name a file with -pretrained.')
    if not url:
        raise UserError(
            f'the weights of {published.name} are linked on {published.url}: download the file there and put it into '
            f"'{folder}'."
        )
    log(f'----- Downloading {_mirrored(url)} to {folder}')
    found = download(_mirrored(url), path, sha256)
    log(f'----- Downloaded {path}, SHA-256 {found}' + ('' if sha256 else ' (none is published to compare it with)'))
    return path


def convert(name: str, source: str, target: str, log: Callable[[str], None]) -> None:
    """Convert a weight file of the model that a configuration describes to .pdparams, with the classes of the file.

    Args:
        name: name of the configuration, or its YAML file.
        source: see `utils.formats.read_file`.
    """
    _, arrays = choose_state_dict(read_file(source), prefer_ema=False, source=f"'{source}'")
    model = build_model(get_config(config_file(name)))
    ours = file_format(source) == PADDLE
    match_classes(model, arrays if ours else rename_arrays(model, arrays, source=f"'{source}'"))
    state, report = port_with_report(model, arrays, own_names=ours, source=f"'{source}'")
    metadata = model.weight_rules.metadata(model)
    write_pdparams({**state, METADATA: metadata} if metadata else state, target)
    log(f'----- Converted to {target}: {len(report.used)} arrays')
