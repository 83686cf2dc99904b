"""The code of a job that waits in the queue: a copy, so that an edit in the meantime does not change what runs.

``FOLDER/code/HASH`` holds the three packages as they were at the submission, and ``environment.json`` with the versions
of everything installed, which is not copied: a job that meets other versions says so. Equal code is kept once.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from hpc import atomic

PACKAGES = ("hpc", "nanodist", "launch")
CODE = "NANODIST_CODE"
_ENVIRONMENT = "environment.json"
_LEFT_OUT = ("__pycache__",)


def freeze(folder: str | Path) -> Path:
    """The copy of the present code under ``folder``, made where it is missing."""
    files = sources()
    digest = hashlib.blake2b(digest_size=6)
    for name, data in files.items():
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
    place = Path(folder).absolute() / "code" / digest.hexdigest()
    if not place.is_dir():
        try:
            with atomic.directory(place) as temporary:
                for name, data in files.items():
                    path = temporary / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(data)
                record = {"python": sys.executable, "versions": versions()}
                (temporary / _ENVIRONMENT).write_text(json.dumps(record, indent=1) + "\n")
        except OSError:
            if not place.is_dir():  # otherwise another submission was faster
                raise
    return place


@functools.cache
def sources() -> dict[str, bytes]:
    """Content of every file of the packages, in a fixed order; all submissions of this process have the same."""
    return dict(_read())


def _read() -> Iterator[tuple[str, bytes]]:
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        root = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(root.rglob("*")):
            if path.is_file() and not set(_LEFT_OUT) & set(path.parts):
                yield f"{package}/{path.relative_to(root).as_posix()}", path.read_bytes()


@functools.cache
def versions() -> dict[str, str]:
    """Version of every installed distribution."""
    found = ((one.metadata["Name"], one.version) for one in metadata.distributions())
    return dict(sorted((name, version) for name, version in found if name))


def environment(code: Path, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a process needs to run ``code``, whatever lies in its working directory."""
    rest = environ.get("PYTHONPATH")
    return {
        CODE: str(code),
        "PYTHONPATH": f"{code}{os.pathsep}{rest}" if rest else str(code),
        "PYTHONSAFEPATH": "1",  # the working directory, often a checkout, would come first
    }


def shell_lines(code: Path) -> list[str]:
    """:func:`environment` for a batch script; what modules and ``setup`` put into PYTHONPATH stays behind it."""
    return [
        f"export {CODE}={shlex.quote(str(code))}",
        f'export PYTHONPATH="${CODE}${{PYTHONPATH:+:$PYTHONPATH}}" PYTHONSAFEPATH=1',
    ]


def changed(environ: Mapping[str, str] = os.environ) -> list[str]:
    """What is not as it was when this job was submitted, in sentences; none outside of a job."""
    code = environ.get(CODE)
    if not code:
        return []
    found = []
    if Path(__file__).resolve().parent.parent != Path(code).resolve():
        found.append(f"this job runs the code in {Path(__file__).parent.parent}, not its snapshot in {code}")
    try:
        before = json.loads((Path(code) / _ENVIRONMENT).read_text())["versions"]
    except (OSError, ValueError, KeyError) as error:
        return [*found, f"the snapshot's {_ENVIRONMENT} cannot be read ({error})"]
    now = versions()
    apart = [name for name in before if before[name] != now.get(name)]
    if apart:
        some = ", ".join(f"{name} {before[name]} -> {now.get(name, 'none')}" for name in apart[:5])
        found.append(f"{len(apart)} packages changed since this job was submitted: {some}")
    return found
