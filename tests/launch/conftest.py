"""What tests of launch share."""

import pytest


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A small store with labels."""
    from nanodist import cli

    out = tmp_path_factory.mktemp("data")
    wires = ["synth", "wires", f"--out={out / 'synth'}", "--micrographs=8", "--size=128", "--seed=0", "--workers=1"]
    assert cli.main(wires) == 0
    packed = ["pack", str(out / "synth" / "images"), "--labels=folder", "--tile=128", f"--out={out / 'store'}"]
    assert cli.main([*packed, "--workers=1"]) == 0
    return out / "store"
