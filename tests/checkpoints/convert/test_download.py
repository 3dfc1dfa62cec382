"""Download of a published file: complete, resumed, verified, from any kind of server."""

import hashlib

import pytest
from web import (
    CONTENT,
    FOREIGN,
    MD5,
    SHA256,
    chunked,
    complete,
    head,
    ranged,
    redirect,
    refusal,
    visible,
    without_length,
)

from ddim.checkpoints.convert import download
from ddim.checkpoints.convert.download import fetch


@pytest.fixture
def bars(monkeypatch):
    """The progress bars that were shown."""
    shown = []

    class Bar:
        def __init__(self, *, total, initial, unit, desc, **looks):
            self.total, self.initial, self.steps, self.unit, self.desc = total, initial, [], unit, desc
            shown.append(self)

        def update(self, n):
            self.steps.append(n)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.closed = True

    monkeypatch.setattr(download, "tqdm", Bar)
    return shown


def invalid_length(handler, site):
    head(handler, 200, "long")
    site.send(handler, CONTENT)


@pytest.mark.parametrize("checksum", [MD5, SHA256], ids=["MD5", "SHA-256"])
@pytest.mark.parametrize("answer", [ranged(), complete(), without_length, chunked(), invalid_length])
def test_a_file_is_downloaded_into_a_new_folder(site, tmp_path, checksum, answer):
    site.answers = [answer]
    folder = tmp_path / "a" / "b"
    path = fetch(site.published(checksum), folder)
    assert path == folder / "toy.ckpt"
    assert path.read_bytes() == CONTENT
    assert site.requests == [("/f/0123/?dl=1", None)]
    assert visible(folder) == ["toy.ckpt"]


def test_progress_resumes_where_the_download_stopped(site, tmp_path, bars):
    site.answers = [ranged(stop=300_000), ranged()]
    refusal(site.published(), tmp_path)
    fetch(site.published(), tmp_path)
    assert [(bar.total, bar.unit, bar.desc, bar.closed) for bar in bars] == [(700_001, "B", "toy.ckpt", True)] * 2
    assert [(bar.initial, sum(bar.steps)) for bar in bars] == [(0, 300_000), (300_000, 400_001)]
    assert len(bars[0].steps) > 1  # it moves meanwhile


def test_progress_without_a_content_length_has_no_total(site, tmp_path, bars):
    (tmp_path / "toy.ckpt.part").write_bytes(CONTENT[:300_000])
    site.answers = [without_length]
    fetch(site.published(), tmp_path)
    assert [(bar.total, bar.initial, sum(bar.steps)) for bar in bars] == [(None, 0, 700_001)]


@pytest.mark.parametrize("stops", [(1,), (262_144,), (300_000,), (700_000,), (0, 1000, 1000, 500_000)])
def test_a_broken_download_resumes_at_that_byte(site, tmp_path, stops):
    site.answers = [*(ranged(stop=stop) for stop in stops), ranged()]
    for stop in stops:
        assert f"broke off after {stop:,} of 700,001 bytes" in refusal(site.published(), tmp_path)
        assert visible(tmp_path) == ["toy.ckpt.part"]
        assert (tmp_path / "toy.ckpt.part").read_bytes() == CONTENT[:stop]
    assert fetch(site.published(), tmp_path).read_bytes() == CONTENT
    assert site.ranges == [None, *(f"bytes={stop}-" if stop else None for stop in stops)]
    assert site.sent == 700_001  # each byte once
    assert visible(tmp_path) == ["toy.ckpt"]


def test_a_broken_download_of_unknown_length_is_detected(site, tmp_path):
    site.answers = [chunked(stop=300_000), complete()]
    message = refusal(site.published(), tmp_path)
    assert site.url in message
    assert CONTENT.startswith((tmp_path / "toy.ckpt.part").read_bytes())
    assert fetch(site.published(), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "part", [CONTENT[:300_000], FOREIGN[:300_000], FOREIGN + FOREIGN], ids=["ours", "foreign", "long"]
)
def test_a_server_without_ranges_sends_the_file_again(site, tmp_path, part):
    site.answers = [complete()]
    (tmp_path / "toy.ckpt.part").write_bytes(part)
    assert fetch(site.published(), tmp_path).read_bytes() == CONTENT
    assert site.ranges == [f"bytes={len(part)}-"]
    assert visible(tmp_path) == ["toy.ckpt"]


def test_broken_download_without_ranges_keeps_its_last_bytes(site, tmp_path):
    site.answers = [complete(stop=1000), ranged()]
    (tmp_path / "toy.ckpt.part").write_bytes(FOREIGN[:300_000])
    refusal(site.published(), tmp_path)
    assert (tmp_path / "toy.ckpt.part").read_bytes() == CONTENT[:1000]
    assert fetch(site.published(), tmp_path).read_bytes() == CONTENT


def test_a_complete_partial_file_is_renamed(site, tmp_path):
    (tmp_path / "toy.ckpt.part").write_bytes(CONTENT)
    assert fetch(site.published(), tmp_path).read_bytes() == CONTENT
    assert (site.ranges, site.sent) == (["bytes=700001-"], 0)
    assert visible(tmp_path) == ["toy.ckpt"]


@pytest.mark.parametrize(
    "part",
    [CONTENT + b"more", FOREIGN + FOREIGN, FOREIGN, FOREIGN[:300_000], b"\0" + CONTENT[1:300_000]],
    ids=["longer", "long and foreign", "foreign", "foreign beginning", "one wrong byte"],
)
def test_a_partial_file_with_wrong_bytes_is_removed(site, tmp_path, part):
    (tmp_path / "toy.ckpt.part").write_bytes(part)
    assert f"that of the published file {MD5}" in refusal(site.published(), tmp_path)
    assert visible(tmp_path) == []
    assert fetch(site.published(), tmp_path).read_bytes() == CONTENT
    assert site.ranges == [f"bytes={len(part)}-", None]


@pytest.mark.parametrize(("kind", "checksum"), [("MD5", "0" * 32), ("SHA-256", "0" * 64)])
def test_a_download_with_a_wrong_checksum_is_removed(site, tmp_path, kind, checksum):
    site.answers = [ranged(FOREIGN)]
    found = hashlib.new(kind.lower().replace("-", ""), FOREIGN, usedforsecurity=False).hexdigest()
    message = refusal(site.published(checksum), tmp_path)
    assert f"not the published toy: its {kind} is {found}, that of the published file {checksum};" in message
    assert site.url in message
    assert visible(tmp_path) == []


def test_the_file_is_renamed_after_verification(site, tmp_path, monkeypatch):
    seen = []
    site.answers = [ranged(stop=300_000), ranged(stop=699_999, then=lambda site: seen.append(visible(tmp_path)))]
    for _ in range(2):
        refusal(site.published(), tmp_path)

    def file_checksums(path):
        seen.append(visible(tmp_path))
        assert path.read_bytes() == CONTENT
        return original(path)

    original = download.file_checksums
    monkeypatch.setattr(download, "file_checksums", file_checksums)
    site.answers = [ranged()]
    fetch(site.published(), tmp_path)
    assert seen == [["toy.ckpt.part"]] * 2
    assert visible(tmp_path) == ["toy.ckpt"]


@pytest.mark.parametrize("checksum", [MD5, SHA256], ids=["MD5", "SHA-256"])
def test_an_existing_file_needs_no_network_and_no_lock(site, tmp_path, checksum):
    path = tmp_path / "toy.ckpt"
    path.write_bytes(CONTENT)
    before = path.stat()
    assert fetch(site.published(checksum), tmp_path) == path
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert list(tmp_path.iterdir()) == [path]  # not even a lock: folders that are shared are often read-only
    assert site.requests == []


@pytest.mark.parametrize("present", [b"", CONTENT[:-1], CONTENT + b"\n", FOREIGN])
def test_an_existing_file_with_a_wrong_checksum_is_kept(site, tmp_path, present):
    (tmp_path / "toy.ckpt").write_bytes(present)
    message = refusal(site.published(), tmp_path)
    assert f"{tmp_path / 'toy.ckpt'} is not the published toy" in message
    assert "move it away" in message
    assert (tmp_path / "toy.ckpt").read_bytes() == present
    assert site.requests == []


def test_a_download_is_resumed_through_a_redirect(site, tmp_path):
    site.answers = [redirect, ranged(stop=300_000), redirect, ranged()]
    refusal(site.published(), tmp_path)
    assert fetch(site.published(), tmp_path).read_bytes() == CONTENT
    first, second = [("/f/0123/?dl=1", None), ("/files/toy.bin", None)], "bytes=300000-"
    assert site.requests == [*first, *((path, second) for path, _ in first)]


def test_an_interrupted_download_is_resumed(site, tmp_path, monkeypatch, bars):
    def interrupt(bar, n):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(download.tqdm, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(site.published(), tmp_path)
    assert visible(tmp_path) == ["toy.ckpt.part"]
    kept = (tmp_path / "toy.ckpt.part").read_bytes()
    assert kept == CONTENT[: len(kept)] != b""
    assert fetch(site.published(), tmp_path).read_bytes() == CONTENT
    assert site.ranges == [None, f"bytes={len(kept)}-"]
