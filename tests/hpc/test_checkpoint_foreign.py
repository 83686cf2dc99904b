"""DeepSpeed's own checkpoints: read without trust where the restricted reader suffices, with it only otherwise."""

import argparse
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from hpc.checkpoint.foreign import read_deepspeed
from hpc.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
SAVE = """
import argparse, sys, torch
import torch.distributed as dist
from hpc.engine import _import_deepspeed
deepspeed = _import_deepspeed()
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/rendezvous", rank=0, world_size=1)
for stage in (0, 2, 3):
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save(module.state_dict(), f"{sys.argv[1]}/truth{stage}.pt")
    config = {"train_batch_size": 2, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.AdamW(module.parameters())
    engine = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)[0]
    engine.save_checkpoint(f"{sys.argv[1]}/plain{stage}")
    engine.save_checkpoint(f"{sys.argv[1]}/more{stage}", client_state={"args": argparse.Namespace(lr=1)})
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints that DeepSpeed itself wrote."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("deepspeed")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SAVE, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("stage", [0, 2])
def test_tensors_alone_need_no_trust(saved, stage):
    truth = torch.load(saved / f"truth{stage}.pt", weights_only=True)
    for path in ("", "/latest", "/global_step0", "/global_step0/mp_rank_00_model_states.pt"):
        read = read_deepspeed(f"{saved}/plain{stage}{path}")
        assert set(read) == set(truth) and all(torch.equal(read[name], truth[name]) for name in truth)


@pytest.mark.parametrize("stage", [0, 2])
def test_more_than_tensors_is_read_by_trust_only(saved, stage):
    with pytest.raises(UserError, match=r"more than tensors \(argparse\.Namespace\).*give --trust") as caught:
        read_deepspeed(saved / f"more{stage}")
    assert "\n" not in str(caught.value)
    truth = torch.load(saved / f"truth{stage}.pt", weights_only=True)
    assert torch.equal(read_deepspeed(saved / f"more{stage}", trust=True)["0.weight"], truth["0.weight"])


@pytest.mark.parametrize("trust", [False, True])
def test_parts_of_zero_3_are_refused(saved, trust):
    with pytest.raises(UserError, match="ZeRO stage 3, in parts; join them with its own zero_to_fp32"):
        read_deepspeed(saved / "plain3", trust)


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def _tag(folder, content, name="mp_rank_00_model_states.pt"):
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / name)
    return folder


def test_code_in_a_file_does_not_run_without_trust(tmp_path):
    weights = OrderedDict(w=torch.ones(2, dtype=torch.bfloat16))
    folder = _tag(tmp_path / "tag", {"module": weights, "bomb": _Bomb(tmp_path / "ran")})
    with pytest.raises(UserError, match="runs whatever code it carries"):
        read_deepspeed(folder)
    assert not (tmp_path / "ran").exists()
    assert read_deepspeed(folder, trust=True)["w"].dtype == torch.float32
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("pointer", ["../outside", "", "..", "nowhere", "/tmp"])
def test_latest_does_not_lead_out_of_the_folder(tmp_path, pointer):
    _tag(tmp_path / "outside", {"module": {"w": torch.ones(2)}})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest").write_text(pointer)
    with pytest.raises(UserError, match="which is no folder in"):
        read_deepspeed(tmp_path / "run")


def test_what_is_no_checkpoint_is_said(tmp_path):
    with pytest.raises(UserError, match="is not there"):
        read_deepspeed(tmp_path / "nowhere")
    with pytest.raises(UserError, match="it has no mp_rank_00_model_states"):
        read_deepspeed(tmp_path)
    for content in ({"module": None}, {"module": {}}, {"module": {"a": argparse.Namespace()}}, [1], {"weights": 1}):
        with pytest.raises(UserError, match="holds no weights by name"):
            read_deepspeed(_tag(tmp_path / "tag", content), trust=True)
    file = tmp_path / "tag" / "mp_rank_00_model_states.pt"
    torch.save({"module": {"w": torch.ones(99)}}, file)
    file.write_bytes(file.read_bytes()[:-300])
    for trust in (False, True):
        with pytest.raises(UserError, match="cannot be read"):
            read_deepspeed(file, trust)
    torch.save({"module": {"w": torch.ones(2)}}, file)
    _tag(tmp_path / "tag", {}, "mp_rank_01_model_states.pt")
    with pytest.raises(UserError, match="model parallelism"):
        read_deepspeed(tmp_path / "tag")
