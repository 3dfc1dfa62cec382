"""A download that fails explains the manual download; processes that download the same file at the same time."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from web import CONTENT, MD5, explains_manual_download, ranged, redirect, refusal, stalled, status, visible

from ddim.checkpoints.convert import download
from ddim.checkpoints.convert.download import fetch


def raw(line):
    return lambda handler, site: handler.wfile.write(line)


ANSWERS = [
    (status(403), "(the server answers 403 Forbidden"),
    (status(404), "(the server answers 404 Not Found"),
    (status(416), "(the server answers 416 "),  # in answer to a request without a range: a broken server
    (status(500), "(the server answers 500 Internal Server Error"),
    (status(503), "(the server answers 503 Service Unavailable"),
    (raw(b""), "Remote end closed connection without response"),
    (raw(b"hello\r\n"), "(hello)"),
    (raw(b"HTTP/1.1 404 \r\nContent-Length: 0\r\n\r\n"), "the server answers 404)"),
    (raw(b"HTTP/1.1 200 OK\r\n" + 200 * b"a: b\r\n" + b"\r\n"), "got more than 100 headers"),
    (redirect, ""),  # to itself
]


@pytest.mark.parametrize(("answer", "reason"), ANSWERS)
def test_a_wrong_answer_explains_manual_download(site, tmp_path, monkeypatch, answer, reason):
    site.answers = [answer]
    monkeypatch.chdir(tmp_path)
    message = refusal(site.published(), Path("here"))  # a relative folder is named in full
    assert explains_manual_download(message, site.url, tmp_path / "here")
    assert reason in message
    assert visible(tmp_path / "here") == []
    assert len(site.requests) < 30


def test_a_server_error_keeps_the_partial_file(site, tmp_path):
    (tmp_path / "toy.ckpt.part").write_bytes(CONTENT[:1000])
    site.answers = [status(503), ranged()]
    assert "503" in refusal(site.published(), tmp_path)
    assert fetch(site.published(), tmp_path).read_bytes() == CONTENT
    assert site.ranges == ["bytes=1000-", "bytes=1000-"]


def test_a_failed_connection_explains_manual_download(site, tmp_path, monkeypatch):
    def unknown(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/toy"
        message = refusal(replace(site.published(), url=url), tmp_path)
    assert explains_manual_download(message, url, tmp_path)
    assert "onnection refused" in message
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    url = "https://nowhere.invalid/toy"
    message = refusal(replace(site.published(), url=url), tmp_path)
    assert explains_manual_download(message, url, tmp_path)
    assert "Name or service not known" in message


def test_an_error_without_message_is_named(site, tmp_path, monkeypatch):
    def silent(*args, **kwargs):
        raise ConnectionResetError

    monkeypatch.setattr(download.urllib.request, "urlopen", silent)
    assert "(ConnectionResetError)" in refusal(site.published(), tmp_path)


def test_a_folder_or_file_in_the_way_is_refused(site, tmp_path):
    (tmp_path / "taken").write_text("")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        assert explains_manual_download(refusal(site.published(), folder), site.url, folder)
    for make, kind in ((Path.mkdir, "folder"), (os.mkfifo, "fifo")):
        for name, what in (("toy.ckpt", "checkpoint"), ("toy.ckpt.part", "unfinished download")):
            folder = tmp_path / f"{kind} {what}"
            folder.mkdir()
            make(folder / name)
            assert f"the {what} {folder / name} is a {kind}, not a regular file" in refusal(site.published(), folder)
    assert site.requests == []


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
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
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
    assert 10 <= download.TIMEOUT <= 120


# Several processes.


def test_a_waiting_process_resumes_a_broken_download(site, tmp_path):
    begun = threading.Event()

    def breaks_off(site):
        begun.set()
        time.sleep(0.3)  # time for the other to disturb

    site.answers = [ranged(stop=300_000, then=breaks_off), ranged()]
    messages = []
    first = threading.Thread(target=lambda: messages.append(refusal(site.published(), tmp_path)))
    first.start()
    assert begun.wait(10)
    assert fetch(site.published(), tmp_path).read_bytes() == CONTENT
    first.join()
    assert len(messages) == 1
    assert site.ranges == [None, "bytes=300000-"]


CHILD = """
import sys
from pathlib import Path
from ddim.checkpoints.convert.download import fetch
from ddim.checkpoints.convert.model_zoo import PublishedFile
url, checksum, folder = sys.argv[1:]
print(fetch(PublishedFile("toy", "ema", "digits", 7, checksum, url), Path(folder)))
"""


@pytest.fixture
def another(site, tmp_path):
    """A process that is about to fetch the same file into tmp_path."""
    arguments = [sys.executable, "-c", CHILD, site.url, MD5, str(tmp_path)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.integration
def test_of_two_processes_one_downloads_and_both_get_the_file(site, tmp_path, another):
    """Were they to append to one file together, it would hold bytes twice, or change after it was checked."""

    def slowly(handler, site):
        ranged(stop=300_000, then=lambda site: time.sleep(0.7))(handler, site)  # time for the other to disturb
        site.send(handler, CONTENT[300_000:])

    site.answers = [slowly]
    wait_for(lambda: site.requests)
    assert fetch(site.published(), tmp_path).read_bytes() == CONTENT
    assert another.communicate(timeout=60)[0] == f"{tmp_path / 'toy.ckpt'}\n"
    assert (tmp_path / "toy.ckpt").read_bytes() == CONTENT
    assert site.ranges == [None]
    assert visible(tmp_path) == ["toy.ckpt"]


@pytest.mark.integration
def test_a_killed_download_leaves_no_lock_behind(site, tmp_path, another):
    site.answers = [stalled(300_000), ranged()]
    part = tmp_path / "toy.ckpt.part"
    wait_for(lambda: part.exists() and part.stat().st_size)
    another.send_signal(signal.SIGKILL)
    another.wait()
    kept = part.stat().st_size
    assert fetch(site.published(), tmp_path).read_bytes() == CONTENT
    assert site.ranges == [None, f"bytes={kept}-"]


def test_other_files_download_at_the_same_time(site, tmp_path):
    """Another file may be fetched into the same folder meanwhile."""
    begun = threading.Event()

    def waits(site):
        begun.set()
        site.released.wait(20)

    site.answers = [ranged(stop=0, then=waits), ranged()]
    first = threading.Thread(target=refusal, args=(site.published(), tmp_path))
    first.start()
    assert begun.wait(10)
    other = replace(site.published(), name="other")
    assert fetch(other, tmp_path).read_bytes() == CONTENT
    assert first.is_alive()
    site.released.set()
    first.join()
