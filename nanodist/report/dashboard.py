"""W&B workspaces as code: which curves stand where, for each kind of job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpc.errors import UserError
from hpc.wandb_names import sectioned

# kind -> section -> panels; a panel is a title and the metrics (as in metrics.jsonl) that share its axes.
Panels = tuple[tuple[str, tuple[str, ...]], ...]
OVER_SAMPLES = " over samples seen"
COMMON: dict[str, Panels] = {
    "Speed": (
        ("Images a second", ("images_per_s",)),
        ("Share of time that waits for data", ("data_wait_share",)),
        ("Slowest rank over the median", ("slowest_rank_ratio",)),
    ),
    "Optimizer": (
        ("Learning rate", ("lr",)),
        ("Gradient norm", ("gradient_norm",)),
        ("Trust ratios (LARS, LAMB)", ("trust_ratio_min", "trust_ratio_median", "trust_ratio_max")),
    ),
    "Machine": (
        ("Processor, %", ("system.cpu",)),
        ("GPU, %", ("system.gpu.0.gpu",)),
        ("GPU memory, %", ("system.gpu.0.memoryAllocated",)),
        ("Memory of the process, MB", ("system.proc.memory.rssMB",)),
    ),
}
KINDS: dict[str, dict[str, Panels]] = {
    "pretrain": {
        "Training": (("Loss", ("loss",)), (f"Loss{OVER_SAMPLES}", ("loss",))),
        "What is learned": (
            ("Online evaluation, balanced accuracy", ("eval_knn", "eval_linear")),
            ("Effective rank of the embeddings (collapse: towards 1)", ("effective_rank",)),
            ("Spread of the embeddings (collapse: 0)", ("embedding_std",)),
            ("Alignment of the views", ("alignment",)),
            ("Uniformity", ("uniformity",)),
        ),
    },
    "finetune": {
        "Training": (("Loss", ("loss",)), ("Validation loss", ("validation_loss",))),
        "Validation": (
            ("Balanced accuracy", ("validation_balanced_accuracy",)),
            ("Intersection over union", ("validation_iou",)),
        ),
    },
    "pairvae": {
        "Training": (
            ("Loss", ("loss",)),
            ("From one to the other", ("term_saxs_sem", "term_sem_saxs")),
            ("From each to itself", ("term_saxs_saxs", "term_sem_sem")),
            ("Physics of the generated pattern", ("term_physics",)),
        ),
        "Latent space": (
            ("Divergence from the prior", ("term_kl_saxs", "term_kl_sem", "term_kl")),
            ("Coupling of both latents", ("term_coupling",)),
        ),
    },
}
# What a run draws (files of ``pictures/`` and ``report/views.png``), and what is added when it has ended.
PICTURES = {
    "pretrain": ("views", "embeddings", "label-efficiency", "embeddings-map"),
    "finetune": ("overlays", *(f"test-worst-{place}" for place in range(1, 7))),
    "pairvae": ("reconstructions",),
}


def build_dashboard(kind: str, project: str, entity: str = "", groups: Sequence[str] = ()) -> Any:
    """The workspace of a kind of job, as ``wandb_workspaces`` has it; nothing is sent.

    Args:
        kind: ``pretrain``, ``finetune``, ``pairvae`` or ``sweep``: the fine-tunings of all sweeps, or of ``groups``.
        project: W&B project.
        entity: W&B team or user; empty: the one that is logged in.
        groups: W&B groups that are shown; all, where there is none.

    Raises:
        UserError: an unknown kind, or ``wandb-workspaces`` is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise UserError("a dashboard takes wandb-workspaces: pip install 'nanodist[dashboard]'") from None
    if kind not in dashboard_kinds():
        raise UserError(f"no dashboard for '{kind}'; there are {', '.join(dashboard_kinds())}")
    job = "finetune" if kind == "sweep" else kind
    sections = [
        workspaces.Section(
            name=name,
            is_open=name not in COMMON,
            panels=[_curves(reports, title, metrics) for title, metrics in panels],
        )
        for name, panels in {**KINDS[job], **COMMON}.items()
    ]
    if kind == "sweep":
        sections.insert(0, _summary(workspaces, reports))
    else:
        media = reports.MediaBrowser(title="Views and pictures", media_keys=_pictures(job))
        sections.insert(1, workspaces.Section(name="Pictures", is_open=True, panels=[media]))
    rules = [f"Metric('JobType') == '{job}'"]
    if groups:
        rules.append(f"Metric('Group') in {list(groups)!r}")
    return workspaces.Workspace(
        name=f"nanodist {kind}",
        entity=entity,
        project=project,
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis="step"),
        runset_settings=workspaces.RunsetSettings(filters=" and ".join(rules)),
    )


def dashboard_kinds() -> tuple[str, ...]:
    """Kinds of jobs that there is a dashboard for."""
    return (*KINDS, "sweep")


def _curves(reports: Any, title: str, metrics: Sequence[str]) -> Any:
    """A panel over steps, or over samples where its title says so."""
    x = "samples_seen" if title.endswith(OVER_SAMPLES) else "step"
    return reports.LinePlot(title=title, x=x, y=[sectioned(name) for name in metrics])


def _pictures(job: str) -> list[str]:
    return [f"pictures/{name}" for name in PICTURES[job]]


def _summary(workspaces: Any, reports: Any) -> Any:
    """Scores over the number of labels, a point for each fine-tuning."""
    plots = [
        reports.ScatterPlot(
            title=f"{title} over labels per class", x="config:data.labels_per_class", y=f"summary:{sectioned(name)}"
        )
        for title, name in (
            ("Test balanced accuracy", "test/balanced_accuracy"),
            ("Test intersection over union", "test/iou"),
            ("Validation balanced accuracy", "validation_balanced_accuracy"),
            ("Validation intersection over union", "validation_iou"),
        )
    ]
    return workspaces.Section(name="Label efficiency", is_open=True, panels=plots)
