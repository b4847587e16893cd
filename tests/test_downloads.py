"""Downloads, from a server on this machine: complete and checked, or not at all."""

import contextlib
import hashlib
import http.server
import threading

import pytest

from lorajax import downloads

BODY = b"some weights " * 1000
SHA256 = hashlib.sha256(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    requests: list[tuple[str, str, str | None]]

    def respond(self, body):
        self.requests.append((self.command, self.path, self.headers.get("Authorization")))
        if "missing" in self.path:
            self.send_error(404)
        elif "/resolve/" in self.path:  # as the hub does for large files
            self.send_response(302)
            self.send_header("Location", "/blob")
            stated = "0" * 64 if "tampered" in self.path else SHA256
            self.send_header("X-Linked-Etag", f'"{stated}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if "cut" in self.path else body)

    def do_GET(self):
        self.respond(BODY)

    def do_HEAD(self):
        self.respond(b"")

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    handler = type("Recording", (Handler,), {"requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        with contextlib.ExitStack() as stack:
            stack.callback(thread.join)
            stack.callback(running.shutdown)
            running.address = f"http://127.0.0.1:{running.server_port}"
            running.seen = handler.requests
            yield running


def test_a_file_is_fetched_once_and_checked(server, tmp_path):
    path = tmp_path / "deep" / "file"
    for _ in range(2):
        assert downloads.fetch(f"{server.address}/file", path, sha256=SHA256) == path
        assert path.read_bytes() == BODY
    assert len(server.seen) == 1
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_a_wrong_checksum_leaves_nothing_behind(server, tmp_path, algorithm):
    with pytest.raises(downloads.DownloadError, match=f"has {algorithm} .* expected abc"):
        downloads.fetch(f"{server.address}/file", tmp_path / "file", **{algorithm: "abc"})
    assert list(tmp_path.iterdir()) == []


def test_a_changed_local_file_is_noticed(server, tmp_path):
    path = downloads.fetch(f"{server.address}/file", tmp_path / "file", sha256=SHA256)
    path.write_bytes(BODY + b"!")
    with pytest.raises(downloads.DownloadError, match="expected"):
        downloads.fetch(f"{server.address}/file", path, sha256=SHA256)


def test_a_broken_transfer_leaves_nothing_behind(server, tmp_path):
    with pytest.raises(downloads.DownloadError, match=r"(broke off|could not be downloaded)"):
        downloads.fetch(f"{server.address}/cut", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_and_a_missing_server(server, tmp_path):
    with pytest.raises(downloads.DownloadError, match="Not Found"):
        downloads.fetch(f"{server.address}/missing", tmp_path / "file")
    with pytest.raises(downloads.DownloadError, match="could not be downloaded"):
        downloads.fetch("http://127.0.0.1:9/file", tmp_path / "file")


def test_other_schemes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must begin with http"):
        downloads.fetch("file:///etc/hostname", tmp_path / "file")


def test_the_hub_states_the_checksum(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("LORAJAX_CACHE", str(tmp_path))
    path = downloads.fetch_from_hub("owner/name", "model.safetensors")
    assert path == tmp_path / "hub" / "owner--name" / "main" / "model.safetensors"
    assert path.read_bytes() == BODY
    assert server.seen[0] == (
        "HEAD",
        "/owner/name/resolve/main/model.safetensors",
        "Bearer secret",
    )
    downloads.fetch_from_hub("owner/name", "model.safetensors")
    assert len(server.seen) == 3  # HEAD, GET, and where it redirects to; then the cache


def test_the_token_stays_with_the_hub(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "secret")
    headers = downloads._SameOriginRedirect().redirect_request(
        downloads.urllib.request.Request(
            f"{server.address}/a", headers={"Authorization": "Bearer secret"}
        ),
        None,
        302,
        "Found",
        {},
        "http://elsewhere.example/blob",
    )
    assert not headers.has_header("Authorization")


def test_a_file_other_than_the_hub_states_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    with pytest.raises(downloads.DownloadError, match="expected 0000"):
        downloads.fetch_from_hub("owner/tampered", "model.safetensors", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("repository", "file"), [("name", "f"), ("a/b/c", "f"), ("a/b", "../../f")]
)
def test_names_that_are_no_repository(repository, file):
    with pytest.raises(ValueError, match="owner/name"):
        downloads.fetch_from_hub(repository, file)
