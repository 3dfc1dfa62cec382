"""A server of one file on this machine, for the tests of downloads, and what goes wrong on the way."""

import hashlib
import random
import re
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import layouts

from ddim.checkpoints.convert.download import fetch
from ddim.checkpoints.convert.model_zoo import PublishedFile

CONTENT = random.Random(0).randbytes(700_001)  # more than two of the blocks that are read at once
MD5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FOREIGN = random.Random(1).randbytes(len(CONTENT))


class Site:
    """A server of one file. `answers` are given in turn, the last one again and again.

    Attributes:
        requests: (path, Range header or None) of every request, in order.
        sent: bytes of the file that went out.
        released: answers that stall wait for it; set at the latest when the test ends.
    """

    def __init__(self):
        self.answers = [ranged()]
        self.requests = []
        self.sent = 0
        self.released = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.requests.append((self.path, self.headers["Range"]))
                with suppress(ConnectionError):  # the client hung up, which some tests are about
                    site.answers[min(len(site.requests), len(site.answers)) - 1](self, site)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/f/0123/?dl=1"

    @property
    def ranges(self):
        return [wanted for _, wanted in self.requests]

    def published(self, checksum=MD5):
        return PublishedFile("toy", "ema", "digits", 7, checksum, self.url)

    def send(self, handler, piece):
        self.sent += len(piece)  # before: the client may be done with it before this thread goes on
        handler.wfile.write(piece)

    def close(self):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def head(handler, code, length=None, **headers):
    handler.send_response(code)
    if length is not None:
        handler.send_header("Content-Length", str(length))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


def ranged(content=CONTENT, stop=None, then=lambda site: None):
    """A server that continues downloads. It sends up to byte `stop` of the file, does `then`, and hangs up."""

    def answer(handler, site):
        start = int(re.fullmatch(r"bytes=(\d+)-", handler.headers["Range"] or "bytes=0-")[1])
        if start >= len(content):
            return status(416)(handler, site)
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        ranges = {"Content_Range": span} if handler.headers["Range"] else {}
        head(handler, 206 if ranges else 200, len(content) - start, **ranges)
        site.send(handler, content[start:stop])
        then(site)

    return answer


def stalled(stop):
    return ranged(stop=stop, then=lambda site: site.released.wait(20))


def complete(content=CONTENT, stop=None):
    """A server that knows no ranges: everything again, whatever was asked for."""

    def answer(handler, site):
        head(handler, 200, len(content))
        site.send(handler, content[:stop])

    return answer


def without_length(handler, site):
    head(handler, 200)
    site.send(handler, CONTENT)


def chunked(stop=None):
    """A server that does not know how long the file is, and reports when it is over."""

    def answer(handler, site):
        handler.protocol_version = "HTTP/1.1"
        head(handler, 200, Transfer_Encoding="chunked")
        for i in range(0, stop or len(CONTENT), 100_000):
            piece = CONTENT[i : i + 100_000]
            handler.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        if stop is None:
            handler.wfile.write(b"0\r\n\r\n")
        handler.close_connection = True

    return answer


def status(code):
    def answer(handler, site):
        head(handler, code, 5)
        handler.wfile.write(b"<p>?\n")

    return answer


def redirect(handler, site):
    head(handler, 302, 0, Location="/files/toy.bin")


def visible(folder):
    """Names in a folder, without the lock's."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def refusal(published, folder):
    """Return the one sentence with which fetching fails."""
    message = layouts.refusal(fetch, published, folder)
    assert ". " not in message
    return message


def explains_manual_download(message, url, folder):
    assert message.startswith("toy cannot be downloaded (")
    assert f"or download {url} by hand, name it toy.ckpt, put it into {folder.resolve()} and" in message
    return True
