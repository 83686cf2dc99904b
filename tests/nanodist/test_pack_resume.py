"""A packing that was killed: the same command ends in the same bytes, and nothing before looks like a store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest

from hpc.errors import UserError
from nanodist.shards import PackOptions, Store, assemble, pack, pieces, verify
from tests.nanodist.packing import OPTIONS, ROOT, clean_environment, command, finish, micrographs, start_ranks, tree

PACKED = PackOptions(tile=32, shard_mb=0.05, skip_bad=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return micrographs(tmp_path_factory.mktemp("source"), 60)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "store"
    pack([source], out, PACKED, labels="folder")
    return tree(out)


def killed_at(n, when, work):
    """Whether ``work``, in a process of its own, was killed at the n-th file that it puts under its final name."""
    pid = os.fork()
    if pid == 0:
        replace, count = os.replace, [0]

        def counted(*names):
            count[0] += 1
            if count[0] == n and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*names)
            if count[0] == n:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = counted
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def no_store(path):
    if path.exists():
        return False
    with pytest.raises(UserError):
        Store.open(path.parent / f".{path.name}.packing")
    return True


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_again_and_again_and_started_again(source, whole, tmp_path, when):
    """Each start gets one file further than the last kill, up to the removal of the staging folder."""
    out = tmp_path / "store"
    kills = 0
    while killed_at(kills + 1, when, lambda: pack([source], out, PACKED, labels="folder")):
        kills += 1
        assert no_store(out) or tree(out) == whole
    assert kills >= 6
    assert tree(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def wait_for(found, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not found() and time.monotonic() < deadline:
        time.sleep(0.005)


def test_killed_with_workers_at_the_first_piece(source, whole, tmp_path):
    arguments = command(source, "--out", tmp_path / "store", *OPTIONS, "--workers", "2")
    process = subprocess.Popen(arguments, env=clean_environment(), cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for(lambda: any(tmp_path.glob(".store.packing/pieces/*.json")))
    process.kill()
    killed = process.wait() != 0
    if killed:
        assert no_store(tmp_path / "store") or tree(tmp_path / "store") == whole
    done = subprocess.run(arguments, env=clean_environment(), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if killed else 2), done.stderr
    assert tree(tmp_path / "store") == whole


def test_a_rank_that_is_killed_ends_the_others_and_any_number_goes_on(source, whole, tmp_path):
    arguments = [source, "--out", tmp_path / "store", *OPTIONS]
    processes = start_ranks(2, *arguments)
    wait_for(lambda: any(tmp_path.glob(".store.packing/pieces/*.json")))
    processes[1].kill()
    codes, _, err = finish(processes)
    if codes[0] != 0:
        assert codes == [1, -signal.SIGKILL] and "ended without a word" in err and "the same command goes on" in err
        assert no_store(tmp_path / "store")
        codes, _, err = finish(start_ranks(1, *arguments))
        assert codes == [0], err
    assert tree(tmp_path / "store") == whole


def test_what_is_whole_is_not_done_again(source, whole, tmp_path, monkeypatch):
    """After a full disk in the middle of the shards: no file is converted again, and whole shards stay."""
    import errno

    real, written = assemble.write_shard, []

    def full_at_the_third(path, *rest):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path.name)
        return real(path, *rest)

    monkeypatch.setattr(assemble, "write_shard", full_at_the_third)
    out = tmp_path / "store"
    with pytest.raises(UserError, match=r"disk is full .* is kept in .*\.store\.packing, and the same command goes on"):
        pack([source], out, PACKED, labels="folder")
    assert no_store(out)
    monkeypatch.setattr(assemble, "write_shard", lambda path, *rest: written.append(path.name) or real(path, *rest))
    monkeypatch.setattr(pieces, "convert", lambda *_: pytest.fail("converted again"))
    pack([source], out, PACKED, labels="folder")
    assert tree(out) == whole
    assert len(written) == len(set(written)) == sum(name.endswith(".tar") for name in whole)


def test_a_bad_file_late_and_then_skip_bad_goes_on(source, whole, tmp_path, monkeypatch):
    late = PackOptions(tile=32, shard_mb=0.05)
    (source / "wires" / "zz.png").write_text("text")
    try:
        with pytest.raises(UserError, match="is a text file"):
            pack([source], tmp_path / "store", late, labels="folder", exclude=["*bad*"])
        kept = tmp_path / ".store.packing" / "pieces"
        assert len(list(kept.glob("*.json"))) > 1
        pack([source], tmp_path / "store", PACKED, labels="folder", exclude=["*bad*"])
    finally:
        (source / "wires" / "zz.png").unlink()
    assert {e["source"] for e in Store.open(tmp_path / "store").manifest.dropped} >= {"wires/zz.png"}
    assert verify(tmp_path / "store") == []


def test_a_file_that_changed_in_between_is_converted_again(tmp_path, monkeypatch):
    source = micrographs(tmp_path / "source", 40)
    out = tmp_path / "out" / "store"
    monkeypatch.setattr(pack.__globals__["_Packing"], "_finish", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pack([source], out, PACKED, labels="folder")
    monkeypatch.undo()
    changed = source / "rods" / "m001.png"
    changed.write_bytes((source / "rods" / "m003.png").read_bytes())
    os.utime(changed, ns=(1, 1))
    pack([source], out, PACKED, labels="folder")
    pack([source], tmp_path / "fresh", PACKED, labels="folder")
    assert tree(out) == tree(tmp_path / "fresh")


def test_two_packings_of_one_store_at_once(source, tmp_path):
    from nanodist.shards.staging import Staging

    pytest.importorskip("fcntl")
    staging = Staging(tmp_path / "store")
    staging.open()
    done = subprocess.run(
        command(source, "--out", tmp_path / "store", *OPTIONS),
        env=clean_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "another process is packing" in done.stderr
    assert staging.folder.is_dir()
    staging.close(keep=False)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_other_nodes_do_not_see(tmp_path):
    from nanodist.shards.staging import Staging

    staging = Staging(tmp_path / "store")
    staging.open()
    with pytest.raises(UserError, match="must lie on a file system that all nodes share"):
        staging.check("the token of another rank 0")
    staging.close(keep=False)


def test_a_record_is_json_of_plain_rows(source, tmp_path):
    from nanodist.shards.listing import Listed
    from nanodist.shards.sources import find_sources
    from nanodist.shards.units import plan_units

    found, _ = find_sources([source / "rods" / "stack.tif"])
    unit = plan_units([Listed(found[0], None, "g")], PACKED)[0]
    assert pieces.make_piece(unit, PACKED, tmp_path) == 1
    piece = pieces.load_piece(tmp_path, unit.digest)
    assert piece is not None and pieces.has_data(tmp_path, piece)
    assert [type(entry).__name__ for entry in piece.entries] == (["Seen"] + ["PieceTile"] * 4) * 5
    assert json.loads((tmp_path / f"{unit.digest}.json").read_text())["bytes"] == piece.bytes
    (tmp_path / f"{unit.digest}.bin").write_bytes(b"short")
    assert not pieces.has_data(tmp_path, piece)
