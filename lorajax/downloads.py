"""Checked downloads of public files: nothing is kept whose checksum is wrong."""

import hashlib
import os
import re
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

_CHUNK = 1 << 20
_TIMEOUT = 30.0  # seconds without a byte


class DownloadError(OSError):
    """A file could not be had, or was not what its checksum says."""


def cache_folder() -> Path:
    """Where downloads are kept: LORAJAX_CACHE, or `lorajax` in the user's cache folder."""
    if folder := os.environ.get("LORAJAX_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorajax"


def checksum(path: str | os.PathLike, algorithm: str = "sha256") -> str:
    """Hexadecimal checksum of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def fetch(
    url: str,
    path: str | os.PathLike,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Path:
    """Downloads a file unless it is there, and checks it either way.

    Args:
      url: http or https address.
      path: where the file is to be; its folder is made.
      sha256: expected checksum; None checks nothing.
      md5: expected MD5, for sets whose publisher gives no better one.
      headers: sent with the request.

    Returns:
      `path`. The file appears there complete and checked, or not at all.

    Raises:
      DownloadError: no network, an answer other than success, or a wrong checksum.
      ValueError: for another kind of address.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"url is {url!r}; it must begin with http:// or https://.")
    path = Path(path)
    expected = {k: v.lower() for k, v in (("sha256", sha256), ("md5", md5)) if v}
    if path.is_file():
        _check(path, expected, str(path))
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            request = urllib.request.Request(url, headers=dict(headers or {}))
            opener = urllib.request.build_opener(_SameOriginRedirect)
            with opener.open(request, timeout=_TIMEOUT) as answer:
                while piece := answer.read(_CHUNK):
                    file.write(piece)
                length = answer.headers.get("Content-Length")
            if length is not None and file.tell() != int(length):
                raise DownloadError(f"{url} broke off after {file.tell()} of {length} bytes.")
        _check(Path(partial), expected, url)
        os.replace(partial, path)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise DownloadError(f"{url} could not be downloaded: {reason}.") from error
    finally:
        Path(partial).unlink(missing_ok=True)
    return path


def _check(path: Path, expected: Mapping[str, str], source: str) -> None:
    for algorithm, digest in expected.items():
        found = checksum(path, algorithm)
        if found != digest:
            raise DownloadError(
                f"{source} has {algorithm} {found}; expected {digest}, so it was not used."
            )


class _SameOriginRedirect(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but shows a token to no other host than it was meant for."""

    def redirect_request(self, request, file, code, message, headers, url):
        following = super().redirect_request(request, file, code, message, headers, url)
        if following is not None and urlsplit(url).netloc != urlsplit(request.full_url).netloc:
            following.remove_header("Authorization")
        return following


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args, **kwargs):
        return None


def fetch_from_hub(
    repository: str,
    file: str,
    *,
    revision: str = "main",
    sha256: str | None = None,
    folder: str | os.PathLike | None = None,
) -> Path:
    """Downloads one file of a model repository from the Hugging Face hub.

    Args:
      repository: "owner/name".
      file: path inside the repository.
      revision: branch, tag or commit; a commit makes the result reproducible.
      sha256: expected checksum. Without it, the one that the hub states for large files is used.
      folder: where to keep it; a folder for the repository inside `cache_folder()` if None.

    Returns:
      Path of the file. The hub's address can be changed by HF_ENDPOINT, as in its own client, and
      HF_TOKEN is sent if set.

    Raises:
      DownloadError: no network, no such file, or a wrong checksum.
      ValueError: for a name that is not "owner/name".
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or ".." in f"{file}/{revision}":
        raise ValueError(f"repository is {repository!r}; it must have the form owner/name.")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/{repository}/resolve/{revision}/{file}"
    folder = Path(folder or cache_folder() / "hub" / repository.replace("/", "--") / revision)
    path = folder / file
    token = os.environ.get("HF_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    if sha256 is None and not path.is_file():
        sha256 = _stated_checksum(url, headers)
    return fetch(url, path, sha256=sha256, headers=headers)


def _stated_checksum(url: str, headers: Mapping[str, str]) -> str | None:
    """The sha256 in the hub's own answer, before it redirects to wherever the bytes are."""
    request = urllib.request.Request(url, headers=dict(headers), method="HEAD")
    try:
        answer = urllib.request.build_opener(_NoRedirect).open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code >= 400:
            raise DownloadError(f"{url} could not be downloaded: {error}.") from error
        answer = error
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise DownloadError(f"{url} could not be downloaded: {reason}.") from error
    with answer:
        tag = (answer.headers.get("X-Linked-Etag") or "").strip('"')
    return tag if re.fullmatch(r"[0-9a-f]{64}", tag) else None
