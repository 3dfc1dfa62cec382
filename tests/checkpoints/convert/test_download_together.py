"""Processes that download the same file at the same time."""

import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from web import CONTENT, MD5, ranged, refusal, stalled, visible

from ddim.checkpoints.convert.download import fetch


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
