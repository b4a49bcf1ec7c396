# SPDX-License-Identifier: Apache-2.0
"""Downloads from a local server that breaks off, stalls, redirects or sends something else."""

from __future__ import annotations

import hashlib
import http.server
import os
import threading
import time

import numpy as np
import pytest

from utils import transfer
from utils.errors import UserError
from utils.locks import exclusive, file_lock
from utils.transfer import download

CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, dtype='uint8').tobytes()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Paths say how to answer: /ok, /redirect, /missing, /page, /cut (the first answer is cut off), /stall, /linked."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        kind = self.path.strip('/').split('/')[0]
        self.server.requests.append((kind, self.headers.get('Range')))
        if kind == 'redirect':
            return self.answer(
                302,
                {'Location': '/ok/file.pth', 'X-Linked-Etag': '"%s"' % ('0' * 64 if 'bad' in self.path else SHA256)},
            )
        if kind == 'missing':
            return self.answer(404, {'Content-Length': '0'})
        if kind == 'busy':
            return self.answer(503, {'Content-Length': '0'})
        if kind == 'page':
            return self.answer(200, {'Content-Type': 'text/html; charset=utf-8'}, b'<html>')
        start = int((self.headers.get('Range') or 'bytes=0-')[6:-1])
        fresh = self.headers.get('If-Range') in (None, '"v1"')
        start = start if fresh else 0
        body = CONTENT[start:]
        headers = {'Content-Length': str(len(body)), 'ETag': '"v1"', 'Content-Type': 'application/octet-stream'}
        first = len([1 for name, _ in self.server.requests if name == kind]) == 1
        if kind == 'cut' and first:
            body = body[:100_000]
        if kind == 'stall' and first:
            self.answer(200, headers, body[:80_000])
            time.sleep(1.5)
            return None
        return self.answer(206 if start else 200, headers, body)

    def answer(self, status: int, headers: dict, body: bytes = b''):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()


@pytest.fixture
def server(monkeypatch):
    for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY', 'all_proxy', 'ALL_PROXY'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(transfer.time, 'sleep', lambda seconds: None)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f'http://127.0.0.1:{server.server_port}'
    yield server
    server.shutdown()
    server.server_close()


def content(path) -> bytes:
    with open(path, 'rb') as file:
        return file.read()


@pytest.mark.parametrize('sha256', ['', SHA256, SHA256[:8], SHA256[:8].upper()])
def test_the_right_file(server, tmp_path, sha256):
    path = str(tmp_path / 'folder' / 'file.pth')
    assert download(f'{server.url}/ok/file.pth', path, sha256) == SHA256
    assert content(path) == CONTENT
    assert os.listdir(tmp_path / 'folder') == ['file.pth']


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    with pytest.raises(UserError, match=f'the checksum of the file is {SHA256}, but must be abcd; it is not used'):
        download(f'{server.url}/ok/file.pth', str(tmp_path / 'file.pth'), 'abcd')
    assert os.listdir(tmp_path) == []


def test_a_file_that_is_cut_off_is_continued(server, tmp_path):
    assert download(f'{server.url}/cut/file.pth', str(tmp_path / 'file.pth'), SHA256) == SHA256
    assert server.requests == [('cut', None), ('cut', 'bytes=65536-')]


def test_a_file_of_an_earlier_call_is_continued(server, tmp_path):
    (tmp_path / 'file.pth.part').write_bytes(CONTENT[:1000])
    (tmp_path / 'file.pth.part.etag').write_text('"v1"')
    download(f'{server.url}/ok/file.pth', str(tmp_path / 'file.pth'), SHA256)
    assert server.requests == [('ok', 'bytes=1000-')]


def test_another_version_starts_from_zero(server, tmp_path):
    (tmp_path / 'file.pth.part').write_bytes(b'x' * 1000)
    (tmp_path / 'file.pth.part.etag').write_text('"v0"')
    download(f'{server.url}/ok/file.pth', str(tmp_path / 'file.pth'), SHA256)
    assert content(tmp_path / 'file.pth') == CONTENT


def test_redirects_and_the_checksum_of_hugging_face(server, tmp_path):
    assert download(f'{server.url}/redirect/file.pth', str(tmp_path / 'file.pth')) == SHA256
    with pytest.raises(UserError, match='must be 0000'):
        download(f'{server.url}/redirect/bad.pth', str(tmp_path / 'bad.pth'))


def test_a_stalled_server(server, tmp_path):
    assert download(f'{server.url}/stall/file.pth', str(tmp_path / 'file.pth'), SHA256, timeout=0.4) == SHA256
    assert server.requests[1][1] is not None, 'continued'


@pytest.mark.parametrize(
    ('kind', 'message'),
    [
        ('missing', 'the server answered 404 Not Found; nothing is downloaded'),
        ('page', 'is a web page and not a file; open it in a browser'),
        ('busy', 'the server answered 503; run the command again to continue, or put the file at'),
    ],
)
def test_errors(server, tmp_path, kind, message):
    with pytest.raises(UserError, match=message):
        download(f'{server.url}/{kind}/file.pth', str(tmp_path / 'file.pth'))
    assert len(server.requests) == (3 if kind == 'busy' else 1)


def test_no_connection(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r'no connection to 127.*put the file at .*file\.pth'):
        download(f'{server.url}/ok/file.pth', str(tmp_path / 'file.pth'))
    with pytest.raises(UserError, match='cannot be downloaded: '):
        download('nonsense', str(tmp_path / 'file.pth'))


def test_one_holder_at_a_time(tmp_path):
    """A second process waits and says for which."""
    path, lines = str(tmp_path / 'lock'), []
    child = os.fork()
    if not child:  # record locks belong to processes
        with file_lock(path):
            time.sleep(1)
        os._exit(0)
    while not os.path.exists(path):
        time.sleep(0.01)
    with exclusive(path, lines.append, pause=0.05):
        assert os.waitpid(child, os.WNOHANG) != (0, 0) or lines
    assert len(lines) == 1 and f'process {child}' in lines[0]
