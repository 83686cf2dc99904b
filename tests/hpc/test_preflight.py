import dataclasses
import os
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hpc import preflight, preflight_limits, preflight_quota
from hpc.preflight import Finding, agreement, all_reduce, errors, merged, shared_folder, storage
from hpc.preflight_limits import end, fits
from hpc.preflight_network import addresses, interface, selected
from hpc.preflight_quota import Room, mount_of, room
from hpc.topology import Topology

GIB = 2**30
TWO_NODES = Topology(1, 2, 0, 1, 1, 2, "node2", "srun", "node1", 12345)


def program(folder, name, body):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


def level(findings):
    (finding,) = findings
    return finding.level


# Disk


def test_a_folder_with_room_is_fine_and_left_as_it_was(tmp_path):
    (finding,) = storage(tmp_path / "runs" / "new", 1, 2, 3)
    assert finding.level == "ok" and str(tmp_path) in finding.what
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        (Room(10 * GIB, None, "free space"), "ok"),
        (Room(10 * GIB, 50, "free space"), "ok"),
        (Room(3 * GIB, None, "free space"), "warning"),
        (Room(1 * GIB, None, "quota of the user"), "error"),
        (Room(10 * GIB, 49, "quota of the user"), "error"),
    ],
)
def test_room_is_compared_with_what_checkpoints_need(tmp_path, monkeypatch, left, expected):
    monkeypatch.setattr(preflight, "room", lambda place: left)
    (finding,) = storage(tmp_path, 2 * GIB, 4 * GIB, 50)
    assert finding.level == expected and left.source in finding.what


def test_what_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "is a file" in errors(storage(tmp_path / "file" / "runs", 1, 1, 1))[0]

    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    assert "Read-only" in errors(storage(tmp_path, 1, 1, 1))[0]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_an_error(tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot be written" in errors(storage(tmp_path, 1, 1, 1))[0]


def test_free_space_is_that_of_the_file_system(tmp_path):
    free = os.statvfs(tmp_path)
    found = room(tmp_path, mounts="")
    assert found.source == "free space"
    assert abs(found.bytes - free.f_bavail * free.f_frsize) < GIB


def test_mounts_are_told_apart_by_the_longest_prefix():
    mounts = "/dev/a / ext4 rw 0 0\nb@tcp:/lustre /my\\040data lustre rw 0 0\nc /my nfs rw 0 0\n"
    places = [Path("/my data/runs"), Path("/my/data"), Path("/my datas")]
    assert [mount_of(place, mounts)[2] for place in places] == ["lustre", "nfs", "ext4"]


LFS = """
case "$1 $2 $3" in
"project -d "*) echo "  {project} P $3" ;;
"quota -q -u") echo "/long/name/of/a/mount"; echo "  1048576 0 {user} - 10 0 0 -" ;;
"quota -q -g") echo "/mnt [2097152]* 1048576 0 6d23h 7 0 100 -" ;;
"quota -q -p") echo "/mnt 1024 0 4096 - 1 0 0 -" ;;
esac"""


@pytest.mark.parametrize(
    ("project", "user", "expected"),
    [
        (0, 3145728, Room(0, 93, "Lustre quota of the group")),
        (7, 0, Room(0, 93, "Lustre quota of the group")),
    ],
)
def test_lustre_is_asked_for_user_group_and_project(tmp_path, project, user, expected):
    environ = program(tmp_path / "bin", "lfs", LFS.format(project=project, user=user))
    assert room(tmp_path, environ, f"x {tmp_path} lustre rw 0 0") == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/dev/x 1048576 0 3145728 0 10 0 0 0", Room(2 * GIB, None, "quota of the user")),
        ("/dev/x 1048576* 524288 3145728 9 10 0 100 0", Room(2 * GIB, 90, "quota of the user")),
    ],
)
def test_unix_quotas(tmp_path, monkeypatch, line, expected):
    class Large:
        f_bavail, f_frsize, f_files, f_favail = 2**40, 1, 0, 0

    monkeypatch.setattr(preflight_quota.os, "statvfs", lambda _: Large)
    environ = program(tmp_path / "bin", "quota", f"echo Disk quotas; echo Filesystem blocks; echo '{line}'; exit 1")
    assert room(tmp_path, environ, f"/dev/x {tmp_path} xfs rw 0 0") == expected
    assert room(tmp_path, environ, f"/dev/x {tmp_path} tmpfs rw 0 0").source == "free space"


def test_spectrum_scale_rows_are_read_by_their_names(tmp_path):
    head = "mmlsquota::HEADER:version:a:b:filesystemName:quotaType:id:name:blockUsage:blockQuota:blockLimit"
    head += ":blockInDoubt:blockGrace:filesUsage:filesQuota:filesLimit:filesInDoubt"
    values = ("other:USR:5:me:1:1:1:0:none:1:1:1:0", "fs1:USR:5:me:1024:0:3072:0:none:1:0:9:0")
    rows = [f"mmlsquota::0:1:::{value}" for value in values]
    body = "\n".join(f"echo '{line}'" for line in (head, *rows))
    environ = program(tmp_path / "bin", "mmlsquota", body)
    assert room(tmp_path, environ, f"/dev/fs1 {tmp_path} gpfs rw 0 0") == Room(
        2 * 2**20, 8, "USR quota of Spectrum Scale"
    )


def test_a_quota_program_that_hangs_or_babbles_leaves_the_free_space(tmp_path):
    mounts = f"x {tmp_path} lustre rw 0 0"
    began = time.monotonic()
    environ = program(tmp_path / "bin", "lfs", "exec sleep 60")
    assert room(tmp_path, environ, mounts).source == "free space" and time.monotonic() - began < 10
    environ = program(tmp_path / "bin", "lfs", "echo lfs: permission denied for you and me and all of us here")
    assert room(tmp_path, environ, mounts).source == "free space"


# Time and memory


@pytest.mark.parametrize(
    ("steps", "seconds", "speed", "expected", "word"),
    [
        (100, 3600, 10.0, "ok", "17 min of 60 min"),
        (1000, 3600, 10.0, "warning", "about 4 starts"),
        (1000, 3600, None, "ok", "33 images/s"),
        (10, 100, 10.0, "error", "guard.margin_s"),
        (1000, None, 10.0, "ok", "no time limit"),
    ],
)
def test_the_predicted_end(steps, seconds, speed, expected, word):
    (finding,) = end(steps, 100, seconds, 600.0, speed)
    assert finding.level == expected and word in finding.what


def test_no_limit_and_no_speed_say_nothing():
    assert end(10, 100, None, 0.0, None) == []


@pytest.mark.parametrize(
    ("states", "activations", "expected"), [(1, 1, "ok"), (1, 8, "warning"), (11, 0, "error"), (1, 20, "warning")]
)
def test_predicted_memory(states, activations, expected):
    """What is estimated never stops a run; what is certain does."""
    assert level(fits(states * GIB, activations * GIB, 10 * GIB, "of its GPU")) == expected


def test_the_share_of_a_node_is_that_of_its_ranks(monkeypatch):
    monkeypatch.setattr(preflight_limits, "memory_bytes", lambda: 8 * GIB)
    four = dataclasses.replace(TWO_NODES, world_size=8, local_world_size=4)
    assert preflight_limits.memory_of(torch.device("cpu"), four)[0] == 2 * GIB


# Network

KNOWN = {"lo": "127.0.0.1", "eth0": "10.0.0.2", "ib0": "10.1.0.2"}


@pytest.mark.parametrize(
    ("backend", "environ", "address", "expected", "word"),
    [
        ("gloo", {}, "127.0.1.1", "error", "eth0"),
        ("gloo", {}, "", "error", "no address"),
        ("gloo", {}, "10.1.0.2", "ok", "ib0"),
        ("gloo", {"GLOO_SOCKET_IFNAME": "ib0"}, "127.0.1.1", "ok", "ib0"),
        ("gloo", {"GLOO_SOCKET_IFNAME": "ib"}, "10.0.0.2", "error", "GLOO_SOCKET_IFNAME=ib"),
        ("nccl", {}, "127.0.1.1", "warning", "NCCL_SOCKET_IFNAME"),
        ("nccl", {"NCCL_SOCKET_IFNAME": "ib"}, "127.0.1.1", "ok", "ib0"),
        ("nccl", {"NCCL_SOCKET_IFNAME": "=ib"}, "127.0.1.1", "error", "eth0"),
    ],
)
def test_the_interface_of_several_nodes(backend, environ, address, expected, word):
    (finding,) = interface(TWO_NODES, backend, environ, KNOWN, address)
    assert finding.level == expected and word in finding.what


def test_one_node_needs_no_network():
    assert interface(dataclasses.replace(TWO_NODES, node_rank=0, node_count=1), "gloo", {}, {}, "") == []


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("eth", ["eth0"]),
        ("e,ib", ["eth0", "ib0"]),
        ("^lo,eth", ["ib0"]),
        ("=ib0", ["ib0"]),
        ("^=ib0", ["lo", "eth0"]),
    ],
)
def test_nccls_ways_to_name_interfaces(spec, expected):
    assert selected(spec, list(KNOWN)) == expected


@pytest.mark.skipif(not os.path.isdir("/sys/class/net"), reason="not Linux")
def test_loopback_is_listed_with_its_address():
    assert addresses().get("lo", "127.0.0.1") == "127.0.0.1"


# Ranks


def checked(rank, world_size, folder, other_folder, versions, skew):
    real = time.time
    time.time = lambda: real() + (skew if rank == 1 else 0.0)
    try:
        world = dist.group.WORLD
        mine = [Finding("ok", f"from {rank}"), *([Finding("error", "bad")] if rank > 0 else [])]
        return (
            agreement({"torch": versions[rank]}, world, f"node{rank}"),
            shared_folder(Path(other_folder) if rank == 1 else folder, world),
            merged(mine, world, f"n{rank}"),
            merged([Finding("warning", "all"), Finding("warning", "all")], world, f"n{rank}"),
        )
    finally:
        time.time = real


def test_ranks_that_agree(ranks, tmp_path):
    for found in ranks.run(3, checked, tmp_path, tmp_path, ["1", "1", "1"], 0.0):
        assert level(found[0]) == "ok" and "clocks within 0.0" in found[0][0].what
        assert found[1] == []
        assert found[2] == [Finding("ok", "from 0"), Finding("error", "ranks 1, 2 on n1, n2: bad")]
        assert found[3] == [Finding("warning", "all")]
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_differ_are_named(ranks, tmp_path):
    (tmp_path / "there").mkdir()
    found = ranks.run(3, checked, tmp_path / "there", tmp_path / "elsewhere", ["1", "1", "2"], 5.0)
    assert found[0] == found[2] and found[0][0] == found[1][0]
    versions, clock = found[0][0]
    assert versions.level == "error" and "rank 2 on node2: torch 2, rank 0 on node0 1" in versions.what
    assert clock.level == "warning" and "clock of node1 is 5." in clock.what
    assert "rank 1 on" in errors(found[0][1])[0] and "shared file system" in errors(found[0][1])[0]


def summed(rank, world_size, wrong):
    real = dist.all_reduce
    if wrong:
        dist.all_reduce = lambda tensor, *args, **kwargs: None
    try:
        return all_reduce(dist.group.WORLD, "cpu", 1 << 20)
    finally:
        dist.all_reduce = real


def test_the_all_reduce_is_measured_and_its_sum_checked(ranks):
    results = ranks.run(3, summed, False)
    (finding,), exchange = results[0]
    assert finding.level == "ok" and "3 ranks" in finding.what
    assert results[1] == results[2] == results[0]
    assert 1e6 < exchange.bytes_per_s < 1e12 and 0 < exchange.latency_s < 1
    twice, once = exchange.seconds(2e9, 3), exchange.seconds(1e9, 3)
    assert twice - exchange.latency_s == pytest.approx(2 * (once - exchange.latency_s))
    assert errors(ranks.run(3, summed, True)[0][0]) != []


def test_one_process_has_nobody_to_agree_with(tmp_path):
    host = socket.gethostname()
    assert agreement({"torch": "1"}, None, host) == shared_folder(tmp_path, None) == []
    assert all_reduce(None, "cpu") == ([], None)
    assert merged([Finding("error", "x")], None, host) == [Finding("error", "x")]
