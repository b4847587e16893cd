"""Downloads, from a server on this machine: complete and checked, or not at all."""

import contextlib
import hashlib
import http.server
import threading

import pytest

from lorajax import downloads

BODY = b"some weights " * 1000
SHA256 = hashlib.sha256(BODY).hexdigest()
COMMIT = "c" * 40


class Handler(http.server.BaseHTTPRequestHandler):
    requests: list[tuple[str, str, str | None]]
    files = ("model.safetensors",)
    elsewhere = ""

    def respond(self, body):
        if not self.path.startswith("/api/"):  # the client's own housekeeping
            self.requests.append((self.command, self.path, self.headers.get("Authorization")))
        missing = "/resolve/" in self.path and self.path.rpartition("/")[2] not in self.files
        if "missing" in self.path or missing:
            self.send_response(404)
            if "/resolve/" in self.path:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif "/resolve/" in self.path:  # as the hub does for large files
            self.send_response(302)
            self.send_header("Location", f"{self.elsewhere}/blob")
            stated = "0" * 64 if "tampered" in self.path else SHA256
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Linked-Etag", f'"{stated}"')
            self.send_header("X-Linked-Size", str(len(BODY)))
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


@contextlib.contextmanager
def serving(**settings):
    handler = type("Recording", (Handler,), {"requests": [], **settings})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        with contextlib.ExitStack() as stack:
            stack.callback(thread.join)
            stack.callback(running.shutdown)
            running.address = f"http://127.0.0.1:{running.server_port}"
            running.seen = handler.requests
            yield running


@pytest.fixture
def server():
    with serving() as running:
        yield running


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub whose large files lie on another host, as the real one's do."""
    with serving() as store, serving(elsewhere=store.address) as running:
        running.store = store
        monkeypatch.setenv("HF_ENDPOINT", running.address)
        monkeypatch.setenv("HF_TOKEN", "secret")
        monkeypatch.setenv("LORAJAX_CACHE", str(tmp_path))
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
    with pytest.raises(downloads.DownloadError, match="could not be downloaded: Not Found"):
        downloads.fetch(f"{server.address}/missing", tmp_path / "file")
    with pytest.raises(downloads.DownloadError, match="could not be downloaded"):
        downloads.fetch("http://127.0.0.1:9/file", tmp_path / "file")


def test_other_schemes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must begin with http"):
        downloads.fetch("file:///etc/hostname", tmp_path / "file")


def test_the_hub_is_asked_once_and_shown_the_token_alone(hub, tmp_path):
    path = downloads.fetch_from_hub("owner/name", "model.safetensors")
    assert path == tmp_path / "hub" / "owner--name" / "main" / "model.safetensors"
    assert path.read_bytes() == BODY
    assert hub.seen[0] == ("HEAD", "/owner/name/resolve/main/model.safetensors", "Bearer secret")
    assert {token for _, _, token in hub.seen} == {"Bearer secret"}
    assert [token for _, _, token in hub.store.seen] == [None]
    # What the branch holds may change between two requests: the bytes come from the commit named.
    assert all(COMMIT in path for command, path, _ in hub.seen if command == "GET")
    asked = len(hub.seen)
    downloads.fetch_from_hub("owner/name", "model.safetensors")
    assert len(hub.seen) == asked


def test_a_file_other_than_the_hub_states_is_refused(hub, tmp_path):
    with pytest.raises(downloads.DownloadError, match="expected 0000"):
        downloads.fetch_from_hub("owner/tampered", "model.safetensors", folder=tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_file_that_the_hub_lacks_is_told_from_a_hub_that_is_away(hub, monkeypatch):
    with pytest.raises(downloads.MissingFileError, match="owner/name has no file 'config.json'"):
        downloads.fetch_from_hub("owner/name", "config.json")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(downloads.DownloadError, match="could not be downloaded") as caught:
        downloads.fetch_from_hub("owner/name", "model.safetensors")
    assert not isinstance(caught.value, downloads.MissingFileError)


def test_a_checkpoint_comes_with_what_the_hub_has_beside_it(hub, tmp_path):
    folder = downloads.fetch_checkpoint("owner/name", ["config.json"])
    assert (folder / "model.safetensors").read_bytes() == BODY
    assert not (folder / "config.json").exists()


def test_a_checkpoint_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAJAX_CACHE", str(tmp_path))
    asked = []
    files = {"a.safetensors": ""}

    def fetch(repository, file):
        asked.append(file)
        if file not in files:
            raise downloads.MissingFileError(f"no {file}")
        path = tmp_path / file
        path.write_text(files[file])
        return path

    monkeypatch.setattr(downloads, "fetch_from_hub", fetch)
    files["model.safetensors.index.json"] = '{"weight_map": {"x": "a.safetensors"}}'
    downloads.fetch_checkpoint("owner/name")
    assert asked == ["model.safetensors", "model.safetensors.index.json", "a.safetensors"]
    files["model.safetensors.index.json"] = '{"weight_map": {"x": "../a.safetensors"}}'
    with pytest.raises(ValueError, match="outside its folder"):
        downloads.fetch_checkpoint("owner/name")
    del files["model.safetensors.index.json"]
    with pytest.raises(downloads.MissingFileError, match="no model.safetensors"):
        downloads.fetch_checkpoint("owner/name")


@pytest.mark.parametrize(
    ("repository", "file"), [("name", "f"), ("a/b/c", "f"), ("a/b", "../../f")]
)
def test_names_that_are_no_repository(repository, file):
    with pytest.raises(ValueError, match="owner/name"):
        downloads.fetch_from_hub(repository, file)
