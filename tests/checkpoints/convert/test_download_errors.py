"""A download that fails is one sentence that explains the manual download."""

import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
from web import CONTENT, explains_manual_download, ranged, redirect, refusal, stalled, status, visible

from ddim.checkpoints.convert import download
from ddim.checkpoints.convert.download import fetch


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (403, "403 Forbidden"),
        (404, "404 Not Found"),
        (416, "416 "),  # of the whole file, which no sane server says
        (500, "500 Internal Server Error"),
        (503, "503 Service Unavailable"),
    ],
)
def test_a_server_error_explains_manual_download(site, tmp_path, monkeypatch, code, reason):
    site.answers = [status(code)]
    monkeypatch.chdir(tmp_path)
    message = refusal(site.published(), Path("here"))  # a relative folder is named in full
    assert explains_manual_download(message, site.url, tmp_path / "here")
    assert f"(the server answers {reason}" in message
    assert visible(tmp_path / "here") == []


def test_a_server_error_keeps_the_partial_file(site, tmp_path):
    (tmp_path / "toy.ckpt.part").write_bytes(CONTENT[:1000])
    site.answers = [status(503), ranged()]
    assert "503" in refusal(site.published(), tmp_path)
    assert fetch(site.published(), tmp_path).read_bytes() == CONTENT
    assert site.ranges == ["bytes=1000-", "bytes=1000-"]


def test_a_refused_connection_explains_manual_download(site, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/toy"
        message = refusal(replace(site.published(), url=url), tmp_path)
    assert explains_manual_download(message, url, tmp_path)
    assert "onnection refused" in message


def test_an_unknown_host_explains_manual_download(site, tmp_path, monkeypatch):
    def unknown(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    url = "https://nowhere.invalid/toy"
    message = refusal(replace(site.published(), url=url), tmp_path)
    assert explains_manual_download(message, url, tmp_path)
    assert "Name or service not known" in message


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "Remote end closed connection without response"),
        (b"hello\r\n", "(hello)"),
        (b"HTTP/1.1 404 \r\nContent-Length: 0\r\n\r\n", "the server answers 404)"),
        (b"HTTP/1.1 200 OK\r\n" + 200 * b"a: b\r\n" + b"\r\n", "got more than 100 headers"),
    ],
    ids=["nothing", "no HTTP", "no reason", "too many headers"],
)
def test_an_invalid_response_explains_manual_download(site, tmp_path, line, reason):
    site.answers = [lambda handler, site: handler.wfile.write(line)]
    message = refusal(site.published(), tmp_path)
    assert explains_manual_download(message, site.url, tmp_path)
    assert reason in message


def test_an_error_without_message_is_named(site, tmp_path, monkeypatch):
    def silent(*args, **kwargs):
        raise ConnectionResetError

    monkeypatch.setattr(download.urllib.request, "urlopen", silent)
    assert "(ConnectionResetError)" in refusal(site.published(), tmp_path)


def test_a_redirect_loop_ends(site, tmp_path):
    site.answers = [redirect]
    assert explains_manual_download(refusal(site.published(), tmp_path), site.url, tmp_path)
    assert len(site.requests) < 30
    assert not (tmp_path / "toy.ckpt").exists()


def test_a_folder_that_is_a_file_is_refused(site, tmp_path):
    (tmp_path / "taken").write_text("")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        assert explains_manual_download(refusal(site.published(), folder), site.url, folder)
    assert site.requests == []


def test_a_folder_with_the_name_of_the_file_is_refused(site, tmp_path):
    (tmp_path / "toy.ckpt").mkdir()
    assert "Is a directory" in refusal(site.published(), tmp_path)


def test_an_unwritable_folder_is_refused(site, tmp_path):
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("permissions do not bind this user")
        message = refusal(site.published(), tmp_path)
    finally:
        tmp_path.chmod(0o700)
    assert explains_manual_download(message, site.url, tmp_path)
    assert "Permission denied" in message


@pytest.mark.parametrize("stop", [None, 0, 300_000], ids=["no answer", "no content", "in the middle"])
def test_a_stalled_server_times_out(site, tmp_path, monkeypatch, stop):
    monkeypatch.setattr(download, "_TIMEOUT", 0.3)
    silence = stalled(stop) if stop is not None else lambda handler, site: site.released.wait(20)
    site.answers = [silence, ranged()]
    start = time.monotonic()
    message = refusal(site.published(), tmp_path)
    assert 0.3 <= time.monotonic() - start < 5
    assert explains_manual_download(message, site.url, tmp_path)
    assert "timed out" in message
    part = tmp_path / "toy.ckpt.part"
    kept = part.stat().st_size if part.exists() else 0
    assert (0 < kept <= stop) if stop else kept == 0
    assert fetch(site.published(), tmp_path).read_bytes() == CONTENT
    assert site.ranges == [None, f"bytes={kept}-" if kept else None]


def test_the_timeout_is_between_10_and_120_seconds():
    assert 10 <= download._TIMEOUT <= 120
