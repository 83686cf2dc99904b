"""Dashboards as code: every metric that they show is one that runs log, and W&B's client takes them as they are."""

import inspect
import json

import pytest
import torch

from hpc import slow
from hpc.clock import Clock
from hpc.optimizers import OptimizerConfig
from hpc.task import Plan, SavingConfig
from nanodist.cli import main
from nanodist.downstream import online
from nanodist.downstream.finetune import task as classify
from nanodist.downstream.segment import task as segment
from nanodist.objectives.collapse import collapse_measures
from nanodist.report.dashboard import COMMON, KINDS, build_dashboard
from tests.wandb_server import WandbServer

pytest.importorskip("wandb_workspaces")
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style")


def _names(sections):
    return {name for panels in sections.values() for _, names in panels for name in names}


def test_every_metric_is_logged_by_some_run():
    x = torch.eye(4)
    lines = Clock(Plan(1, 1, 1, OptimizerConfig(), SavingConfig()), 0, False).line(1)
    logged = {*lines, *collapse_measures(x, x), "loss", "lr", "gradient_norm"}
    texts = "".join(inspect.getsource(module) for module in (slow, online, classify, segment))
    shown = set().union(*map(_names, (COMMON, *KINDS.values())))
    assert [n for n in shown - logged if not n.startswith("system.") and f'"{n}"' not in texts] == []


@pytest.mark.parametrize("kind", ["pretrain", "finetune", "sweep"])
def test_the_specification_holds_the_panels_and_shows_its_jobs_only(kind, tmp_path):
    assert main(["dashboard", kind, "--project", "tem", "--group", "virus", "--out", str(tmp_path / "d.json")]) == 0
    section = json.loads((tmp_path / "d.json").read_text())["spec"]["section"]
    panels = [p for s in section["panelBankConfig"]["sections"] for p in s["panels"]]
    drawn = {metric for p in panels for metric in p["config"].get("metrics") or []}
    assert _names(KINDS["finetune" if kind == "sweep" else kind]) | _names(COMMON) == drawn
    assert all(p["config"]["xAxis"] == "step" for p in panels if p["viewType"] == "Run History Line Plot")
    rules = {r["key"]["name"]: r["value"] for r in section["runSets"][0]["filters"]["filters"]}
    assert rules == {"jobType": "finetune" if kind == "sweep" else kind, "group": ["virus"]}


def test_the_real_client_saves_it(monkeypatch, capsys):
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        assert main(["dashboard", "pretrain", "--project", "tem", "--entity", "lab"]) == 0
        assert "lab/tem" in capsys.readouterr().out
        (view,) = server.views
    assert json.loads(view["spec"])["section"] and view["displayName"] == "nanodist pretrain"


def test_what_cannot_be_done_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert main(["dashboard", "pretrain"]) == 2
    assert "no W&B API key" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(Exception, match=r"pip install 'nanodist\[dashboard\]'"):
        build_dashboard("pretrain", "p")
