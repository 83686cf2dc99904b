import subprocess
import sys

import numpy as np
import pytest

from hpc import seeding


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Known answers of the Random123 distribution (kat_vectors, philox4x32-10).
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    made = seeding.philox(np.array([counter], np.uint32), np.array([key], np.uint32))
    assert tuple(made[0]) == expected


def test_uniforms_do_not_depend_on_the_batch():
    keys = [seeding.key(0, "view", 0, f"sample-{i}", 1) for i in range(50)]
    together = seeding.uniforms(keys, 10)
    alone = np.concatenate([seeding.uniforms([k], 10) for k in keys])
    assert np.array_equal(together, alone)
    assert together.min() >= 0 and together.max() < 1
    assert abs(together.mean() - 0.5) < 0.05


def test_every_word_of_a_key_counts():
    keys = {seeding.key(s, p, e, k, v) for s in (0, 1) for p in "ab" for e in (0, 1) for k in "xy" for v in (0, 1)}
    assert len(keys) == 32
    assert seeding.key(0, "a", "1", 2) != seeding.key(0, "a", 12)


def test_same_in_another_process():
    code = "from hpc import seeding; print(seeding.key(3, 'order', 7), seeding.permutation(9, 3, 'order', 7).tolist())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == f"{seeding.key(3, 'order', 7)} {seeding.permutation(9, 3, 'order', 7).tolist()}"


def test_permutation_is_one():
    assert sorted(seeding.permutation(1000, 1, "order", 2)) == list(range(1000))
    assert not np.array_equal(seeding.permutation(1000, 1, "order", 2), seeding.permutation(1000, 1, "order", 3))


def test_the_tail_of_a_permutation():
    for n, length in [(1, 1), (7, 0), (7, 7), (1000, 1), (1000, 64)]:
        whole = seeding.permutation(n, 3, "order", 2)
        assert seeding.permutation_tail(n, length, 3, "order", 2).tolist() == whole[n - length :].tolist()
