"""Dashboards as code: every metric that they show is one that runs log, and W&B's client takes them as they are."""

import inspect
import json

import pytest
import torch

from hpc import slow
from hpc.clock import Clock
from hpc.optimizers import OptimizerConfig, trust
from hpc.task import Plan, SavingConfig
from hpc.wandb_names import sectioned
from nanodist.cli import main
from nanodist.downstream import online
from nanodist.downstream.finetune import run as finetune
from nanodist.downstream.finetune import task as classify
from nanodist.downstream.segment import task as segment
from nanodist.objectives.collapse import collapse_measures
from nanodist.pairvae import lu2023, modern, modern_parts
from nanodist.pairvae import task as pairvae
from nanodist.report import for_wandb
from nanodist.report.dashboard import COMMON, KINDS, PICTURES, build_dashboard
from tests.wandb_server import WandbServer

pytest.importorskip("wandb_workspaces")
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style")


def _names(sections):
    return {name for panels in sections.values() for panel in panels for name in panel.metrics}


def test_every_metric_is_logged_by_some_run():
    x = torch.eye(4)
    lines = Clock(Plan(1, 1, 1, OptimizerConfig(), SavingConfig()), 0, False).line(1)
    logged = {*lines, *collapse_measures(x, x), "loss", "lr", "gradient_norm"}
    modules = (slow, online, classify, segment, trust, modern, modern_parts, lu2023)
    texts = "".join(inspect.getsource(module) for module in modules)
    shown = set().union(*map(_names, (COMMON, *KINDS.values())))
    # A PairVAE's terms are logged as term_NAME.
    named = {n: n.removeprefix("term_") for n in shown - logged if not n.startswith("system.")}
    assert [n for n, name in named.items() if f'"{name}"' not in texts] == []


def test_every_picture_is_drawn_by_some_run():
    drawn = inspect.getsource(segment) + inspect.getsource(online) + inspect.getsource(pairvae)
    after = inspect.getsource(for_wandb) + inspect.getsource(finetune)
    for name in {name for names in PICTURES.values() for name in names} - {"views"}:
        stem = name if "test-worst" not in name else "test-worst-"
        assert f'"{stem}-{{' in drawn or f"pictures/{stem}" in after, name


@pytest.mark.parametrize("kind", ["pretrain", "finetune", "pairvae", "sweep"])
def test_the_specification_holds_the_panels_and_shows_its_jobs_only(kind, tmp_path):
    assert main(["dashboard", kind, "--project", "tem", "--group", "virus", "--out", str(tmp_path / "d.json")]) == 0
    section = json.loads((tmp_path / "d.json").read_text())["spec"]["section"]
    panels = [p for s in section["panelBankConfig"]["sections"] for p in s["panels"]]
    drawn = {metric for p in panels for metric in p["config"].get("metrics") or []}
    shown = _names(KINDS["finetune" if kind == "sweep" else kind]) | _names(COMMON)
    assert set(map(sectioned, shown)) == drawn
    axes = [p["config"]["xAxis"] for p in panels if p["viewType"] == "Run History Line Plot"]
    assert axes.count("samples_seen") == (kind == "pretrain") and set(axes) <= {"step", "samples_seen"}
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
