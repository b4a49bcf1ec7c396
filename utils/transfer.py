# SPDX-License-Identifier: Apache-2.0
"""Download one file: resumed after an interruption, checked by size and SHA-256 before it gets its name.

The environment variables HTTP_PROXY, HTTPS_PROXY and NO_PROXY apply.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from urllib.parse import urlsplit

from utils.errors import UserError
from utils.files import cannot_write

TIMEOUT = 30.0  # seconds without data
ATTEMPTS = 3  # of a transfer that breaks off; each continues the file
CHUNK = 1 << 16  # bytes; what arrives of a chunk before a break is lost


class Broken(Exception):
    """The transfer broke off; the text says why. What has arrived is kept."""


def download(url: str, path: str, sha256: str = '', timeout: float = TIMEOUT) -> str:
    """Download `url` to `path` and return the SHA-256 of the file.

    The data is written to `path`.part. A file that is cut off is continued if the server still has the same version.

    Args:
        url: http or https; redirects are followed.
        path: file to write; its folder is created.
        sha256: hexadecimal SHA-256, or its first digits; '': only the size is checked.
        timeout: seconds without data after which an attempt ends.

    Raises:
        UserError: no connection, an error of the server, a web page instead of a file, or another checksum.
    """
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    for attempt in range(ATTEMPTS):
        try:
            known = _transfer(url, f'{path}.part', timeout)
            break
        except Broken as error:
            if attempt == ATTEMPTS - 1:
                raise UserError(
                    f'{url}: {error}; run the command again to continue, or put the file at {path!r} yourself.'
                ) from None
            time.sleep(attempt)
    try:
        found = check_file(f'{path}.part', sha256 or known, url)
    except UserError:
        _forget(f'{path}.part')
        raise
    os.replace(f'{path}.part', path)
    _forget(f'{path}.part')
    return found


def check_file(path: str, sha256: str, source: str) -> str:
    """Return the SHA-256 of a file. Raises UserError if it does not start with the digits `sha256`."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    found = digest.hexdigest()
    if not found.startswith(sha256.lower()):
        raise UserError(f'{source}: the checksum of the file is {found}, but must be {sha256}; it is not used.')
    return found


def _forget(part: str) -> None:
    for file in (part, f'{part}.etag'):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file)


def _transfer(url: str, part: str, timeout: float) -> str:
    """Append the missing bytes to `part`. Return the SHA-256 that the server names (Hugging Face), or ''."""
    import requests

    try:
        with requests.get(url, headers=_headers(part), stream=True, timeout=(min(10.0, timeout), timeout)) as response:
            _check_response(response, url, part)
            _write(response, part)
            return _checksum([*response.history, response])
    except requests.exceptions.Timeout:
        raise Broken(f'no data for {timeout:g} s') from None
    except requests.exceptions.ChunkedEncodingError:
        raise Broken('the connection broke off') from None
    except requests.exceptions.ConnectionError as error:
        if 'timed out' in str(error):  # while the body is read
            raise Broken(f'no data for {timeout:g} s') from None
        raise Broken(f'no connection to {urlsplit(url).netloc}') from None
    except (requests.exceptions.RequestException, ValueError) as error:
        raise UserError(f'{url} cannot be downloaded: {type(error).__name__}.') from None


def _headers(part: str) -> dict[str, str]:
    """Ask for the missing bytes of the version that the first part came from."""
    headers = {'Accept-Encoding': 'identity', 'User-Agent': 'LeanViT'}
    with contextlib.suppress(OSError), open(f'{part}.etag', encoding='ascii') as file:
        size, tag = os.path.getsize(part), file.read()
        if size and tag:
            headers.update({'Range': f'bytes={size}-', 'If-Range': tag})
    return headers


def _check_response(response, url: str, part: str) -> None:
    if response.status_code == 416:  # nothing is missing, or the file has changed
        _forget(part)
        raise Broken('the server refused to continue the file')
    if response.status_code >= 500:
        raise Broken(f'the server answered {response.status_code}')
    if response.status_code >= 400:
        raise UserError(f'{url}: the server answered {response.status_code} {response.reason}; nothing is downloaded.')
    if response.headers.get('Content-Type', '').startswith('text/html'):
        raise UserError(f'{url} is a web page and not a file; open it in a browser and download the file there.')


def _write(response, part: str) -> None:
    """Write the body, with a progress bar on a terminal. Raises Broken if its size is not the announced one."""
    from tqdm import tqdm

    continued = response.status_code == 206
    start = os.path.getsize(part) if continued else 0
    length = response.headers.get('Content-Length')
    total = start + int(length) if length else None
    tag = response.headers.get('ETag', '')
    try:
        with open(part, 'ab' if continued else 'wb') as file:
            with open(f'{part}.etag', 'w', encoding='ascii', errors='ignore') as note:
                note.write('' if tag.startswith('W/') else tag)
            bar = tqdm(
                total=total, initial=start, unit='B', unit_scale=True, desc=os.path.basename(part)[:-5], disable=None
            )
            with bar:
                for chunk in response.iter_content(CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if type(error).__module__.startswith('requests'):
            raise
        raise cannot_write(part, error) from None
    if total is not None and os.path.getsize(part) != total:
        raise Broken(f'{os.path.getsize(part)} of {total} bytes arrived')


def _checksum(responses) -> str:
    for response in responses:
        tag = response.headers.get('X-Linked-Etag', '').strip('"')
        if re.fullmatch(r'[0-9a-f]{64}', tag):
            return tag
    return ''
