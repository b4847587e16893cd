"""Checked downloads of public files: nothing is kept whose checksum is wrong.

Data sets come from their publishers' addresses, models from the Hugging Face hub by its own client.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

_CHUNK = 1 << 20
_TIMEOUT = 30.0  # seconds without a byte


class DownloadError(OSError):
    """A file could not be had, or was not what its checksum says."""


class MissingFileError(DownloadError):
    """The hub answers that a repository has no such file."""


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
) -> Path:
    """Downloads a file unless it is there, and checks it either way.

    Args:
      url: http or https address.
      path: where the file is to be; its folder is made.
      sha256: expected checksum; None checks nothing.
      md5: expected MD5, for sets whose publisher gives no better one.

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
            with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
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


def fetch_from_hub(
    repository: str,
    file: str,
    *,
    revision: str = "main",
    sha256: str | None = None,
    folder: str | os.PathLike | None = None,
) -> Path:
    """Downloads one file of a model repository from the Hugging Face hub, by the hub's own client.

    Args:
      repository: "owner/name".
      file: path inside the repository.
      revision: branch, tag or commit; a commit makes the result reproducible.
      sha256: expected checksum. Without it, the one that the hub states for large files is used.
      folder: where to keep it; a folder for the repository inside `cache_folder()` if None. What is
        there already is taken without asking the hub.

    Returns:
      Path of the file. The client's settings hold: HF_ENDPOINT is the hub's address, HF_TOKEN is
      sent to it alone, HF_HUB_OFFLINE forbids it the network.

    Raises:
      MissingFileError: the repository has no such file.
      DownloadError: no network, no such repository, no access, or a wrong checksum.
      ValueError: for a name that is not "owner/name".
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or ".." in f"{file}/{revision}":
        raise ValueError(f"repository is {repository!r}; it must have the form owner/name.")
    folder = Path(folder or hub_folder(repository, revision))
    path = folder / file
    if path.is_file():
        _check(path, {"sha256": sha256.lower()} if sha256 else {}, str(path))
        return path
    # Imported here: it costs half a second, and nothing but the hub needs it.
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    endpoint = os.environ.get("HF_ENDPOINT")
    url = huggingface_hub.hf_hub_url(repository, file, revision=revision, endpoint=endpoint)
    try:
        stated = huggingface_hub.get_hf_file_metadata(url, endpoint=endpoint)
        huggingface_hub.hf_hub_download(
            repository,
            file,
            revision=stated.commit_hash or revision,
            local_dir=folder,
            endpoint=endpoint,
        )
    except EntryNotFoundError as error:
        raise MissingFileError(f"{repository} has no file {file!r} at {revision}.") from error
    except Exception as error:  # the client's, its HTTP library's, the system's: all mean the same
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise DownloadError(f"{url} could not be downloaded: {reason}.") from error
    # The client compares sizes; a checksum it states for large files only.
    if sha256 is None and re.fullmatch(r"[0-9a-f]{64}", stated.etag or ""):
        sha256 = stated.etag
    try:
        _check(path, {"sha256": sha256.lower()} if sha256 else {}, url)
    except DownloadError:
        path.unlink()
        raise
    return path


def hub_folder(repository: str, revision: str = "main") -> Path:
    """The folder in which files of a repository are kept."""
    return cache_folder() / "hub" / repository.replace("/", "--") / revision


def fetch_checkpoint(repository: str, beside: Iterable[str] = ()) -> Path:
    """Downloads a model's safetensors from the hub, in one file or in several with an index.

    Args:
      repository: "owner/name".
      beside: names of JSON files to fetch as well, where the repository has them.

    Returns:
      The folder that holds them.

    Raises:
      DownloadError: as for `fetch_from_hub`, also for a file `beside` that the hub has and that
        could not be had: a model would silently be read without it.
      ValueError: for an index that names files outside its folder.
    """
    weights, index = "model.safetensors", "model.safetensors.index.json"
    try:
        fetch_from_hub(repository, weights)
    except MissingFileError as error:
        try:
            listing = fetch_from_hub(repository, index)
        except MissingFileError:
            raise error from None
        try:
            names = set(json.loads(listing.read_text(encoding="utf-8"))["weight_map"].values())
            if not all(re.fullmatch(r"[\w-][\w.-]*", name) for name in names):
                raise ValueError("its weight_map names files outside its folder")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
            raise ValueError(f"{index} of {repository} is no index: {problem}.") from problem
        for name in sorted(names):
            fetch_from_hub(repository, name)
    for name in beside:
        with contextlib.suppress(MissingFileError):
            fetch_from_hub(repository, name)
    return hub_folder(repository)
