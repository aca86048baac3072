"""Downloads: checksums, broken transfers, several processes, and what a failure is told."""

import gzip
import http.server
import io
import multiprocessing
import socket
import subprocess
import sys
import threading
import zipfile
from hashlib import md5, sha256
from pathlib import Path

import pytest

from data.download import fetch, read_bytes

REVIEWS = (Path(__file__).parents[1] / "samples" / "reviews.all").read_bytes()


class Server:
    """An HTTP server on this machine whose manners a test can spoil; `asked` lists the Range headers it saw."""

    def __init__(self):
        self.content = REVIEWS * 200
        self.ranges, self.break_at, self.asked = True, None, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.headers.get("Range"))
                if self.path not in ("/file", "/file.zip"):
                    return self.send_error(404)
                start = int(outer.asked[-1][6:-1]) if outer.asked[-1] and outer.ranges else 0
                if start >= len(outer.content):
                    return self.send_error(416)
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(outer.content) - start))
                self.end_headers()
                self.wfile.write(outer.content[start : outer.break_at])

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/file"
        self.sha256 = sha256(self.content).hexdigest()
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_a_download_is_checked_and_done_once(tmp_path, server):
    path = tmp_path / "new" / "file.txt"
    assert fetch(path, server.url, server.sha256) == path
    assert path.read_bytes() == server.content
    fetch(path, server.url, server.sha256)
    assert server.asked == [None]
    assert visible(path.parent) == ["file.txt"]


def test_a_broken_transfer_goes_on_where_it_stopped(tmp_path, server):
    server.break_at = 100_000
    with pytest.raises(ConnectionError, match=r"broke off\. Run the same command again"):
        fetch(tmp_path / "file.txt", server.url, server.sha256)
    assert visible(tmp_path) == ["file.txt.part"]
    assert server.asked == [None, "bytes=65536-"]  # it tried once more, and that brought no whole block
    server.break_at = None
    fetch(tmp_path / "file.txt", server.url, server.sha256)
    assert server.asked[2:] == ["bytes=65536-"]
    assert (tmp_path / "file.txt").read_bytes() == server.content


def test_a_server_without_ranges_starts_again(tmp_path, server):
    server.ranges = False
    (tmp_path / "file.txt.part").write_bytes(server.content[:5000])
    fetch(tmp_path / "file.txt", server.url, server.sha256)
    assert (tmp_path / "file.txt").read_bytes() == server.content


def test_a_server_without_ranges_that_breaks_off_is_given_up(tmp_path, server):
    server.ranges, server.break_at = False, 100_000
    with pytest.raises(ConnectionError, match="broke off"):
        fetch(tmp_path / "file.txt", server.url, server.sha256)
    assert len(server.asked) == 2


def test_a_part_longer_than_the_file_is_dropped(tmp_path, server):
    (tmp_path / "file.txt.part").write_bytes(server.content + b"more")
    fetch(tmp_path / "file.txt", server.url, server.sha256)
    assert (tmp_path / "file.txt").read_bytes() == server.content


def test_a_download_with_a_wrong_checksum_is_deleted(tmp_path, server):
    with pytest.raises(ValueError, match=rf"(?s)expected {'0' * 64}.*got {server.sha256}.*came from {server.url}"):
        fetch(tmp_path / "file.txt", server.url, "0" * 64)
    assert visible(tmp_path) == []


def test_a_damaged_file_is_named_and_left(tmp_path, server):
    path = tmp_path / "file.txt"
    path.write_bytes(b"damaged")
    with pytest.raises(
        ValueError, match=rf"file.txt is not the right file: .* expected {server.sha256}.*another data.root=DIR"
    ):
        fetch(path, server.url, server.sha256)
    assert path.read_bytes() == b"damaged"
    assert server.asked == []


def test_the_checksum_of_a_packed_file_is_that_of_its_content(tmp_path):
    (tmp_path / "file.txt.gz").write_bytes(gzip.compress(REVIEWS))
    assert fetch(tmp_path / "file.txt", None, sha256(REVIEWS).hexdigest()) == tmp_path / "file.txt.gz"
    (tmp_path / "file.txt.gz").write_bytes(gzip.compress(REVIEWS)[:200])
    with pytest.raises(ValueError, match=r"file.txt.gz is damaged"):
        fetch(tmp_path / "file.txt", None, sha256(REVIEWS).hexdigest())


def test_an_unknown_checksum_is_recorded_and_then_holds(tmp_path, server):
    path = tmp_path / "file.txt"
    fetch(path, server.url)
    assert (tmp_path / "file.txt.sha256").read_text().strip() == server.sha256
    fetch(path, server.url)
    path.write_bytes(b"changed")
    with pytest.raises(ValueError, match=rf"expected {server.sha256}"):
        fetch(path, server.url)


def in_zip(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, REVIEWS)
    return file.getvalue()


@pytest.mark.parametrize("kind", [md5, sha256])
@pytest.mark.parametrize("names", [("anything",), ("README", "folder/file")])
def test_a_zip_is_downloaded_as_it_is_and_its_content_checked(tmp_path, server, kind, names):
    server.content = in_zip(*names)
    path, checksum = tmp_path / "file", kind(REVIEWS).hexdigest()
    for _ in range(2):
        assert fetch(path, f"{server.url}.zip", checksum) == tmp_path / "file.zip"
    assert server.asked == [None]
    assert visible(tmp_path) == ["file.zip"]
    assert read_bytes(tmp_path / "file.zip") == REVIEWS
    with pytest.raises(ValueError, match=rf"file\.zip is not the right file: .* expected {'0' * 32}"):
        fetch(path, f"{server.url}.zip", "0" * 32)


def test_a_zip_under_its_own_name_is_checked_as_a_whole(tmp_path, server):
    server.content = in_zip("one", "two")
    checksum = sha256(server.content).hexdigest()
    assert fetch(tmp_path / "file.zip", f"{server.url}.zip", checksum) == tmp_path / "file.zip"
    fetch(tmp_path / "file.zip", f"{server.url}.zip", checksum)


@pytest.mark.parametrize(("checksum", "expected"), [(None, "a complete archive"), ("0" * 32, "0" * 32)])
def test_a_download_that_is_no_archive_is_deleted(tmp_path, server, checksum, expected):
    with pytest.raises(ValueError, match=rf"expected {expected}, got a damaged archive.* came from {server.url}\.zip"):
        fetch(tmp_path / "file", f"{server.url}.zip", checksum)
    assert visible(tmp_path) == []


def test_the_recorded_checksum_of_a_zip_is_that_of_its_content(tmp_path, server):
    server.content = in_zip("file")
    fetch(tmp_path / "file", f"{server.url}.zip")
    assert (tmp_path / "file.sha256").read_text().strip() == sha256(REVIEWS).hexdigest()
    fetch(tmp_path / "file", f"{server.url}.zip")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"0" * 63])
def test_a_damaged_record_of_a_checksum_is_refused(tmp_path, server, content):
    fetch(tmp_path / "file.txt", server.url)
    (tmp_path / "file.txt.sha256").write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.txt\.sha256 is damaged: it holds no sha256"):
        fetch(tmp_path / "file.txt", server.url)


def test_a_page_that_is_not_there_is_reported_with_its_address(tmp_path, server):
    url = server.url + "s"
    with pytest.raises(
        ConnectionError, match=rf"cannot download {url} to .*file.txt: the server answers 404 Not Found"
    ):
        fetch(tmp_path / "file.txt", url, server.sha256)


def test_no_network_names_address_place_and_the_corpus_that_needs_none(tmp_path):
    with socket.socket() as closed:  # bound and never listening: it refuses
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/file"
        with pytest.raises(ConnectionError, match=rf"{url} to {tmp_path}/file.txt: Connection refused.*data=pydoc"):
            fetch(tmp_path / "file.txt", url, "0" * 64)


def test_a_root_that_cannot_be_written_says_what_to_type(tmp_path, server):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(PermissionError, match=r"cannot write to .*data.root=DIR.*SRU_DATA"):
        fetch(tmp_path / "file" / "sentcls" / "cr.all", server.url, server.sha256)


def test_the_command_says_how_a_corpus_is_named():
    command = [sys.executable, "scripts/download.py", "trec"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "type data=trec" in done.stderr


def fetch_together(barrier, *args):
    barrier.wait(30)  # processes begin at different times, and one that comes late finds the file
    fetch(*args)


def test_three_processes_download_a_file_once(tmp_path, server):
    context = multiprocessing.get_context("spawn")  # a fork would copy the server's thread in any state
    arguments = (context.Barrier(3), tmp_path / "file.txt", server.url, server.sha256)
    children = [context.Process(target=fetch_together, args=arguments) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert server.asked == [None]
    assert (tmp_path / "file.txt").read_bytes() == server.content
