"""W&B workspaces as code: which curves stand where, for each kind of job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from hpc.errors import UserError
from hpc.wandb_names import sectioned


class Curves(NamedTuple):
    """A panel: its title, the metrics (as in metrics.jsonl) that share its axes, and the metric along its x axis."""

    title: str
    metrics: tuple[str, ...]
    x: str = "step"


# kind -> section -> panels
Panels = tuple[Curves, ...]
COMMON: dict[str, Panels] = {
    "Speed": (
        Curves("Images a second", ("images_per_s",)),
        Curves("Share of time that waits for data", ("data_wait_share",)),
        Curves("Slowest rank over the median", ("slowest_rank_ratio",)),
    ),
    "Optimizer": (
        Curves("Learning rate", ("lr",)),
        Curves("Gradient norm", ("gradient_norm",)),
        Curves("Trust ratios (LARS, LAMB)", ("trust_ratio_min", "trust_ratio_median", "trust_ratio_max")),
    ),
    "Machine": (
        Curves("Processor, %", ("system.cpu",)),
        Curves("GPU, %", ("system.gpu.0.gpu",)),
        Curves("GPU memory, %", ("system.gpu.0.memoryAllocated",)),
        Curves("Memory of the process, MB", ("system.proc.memory.rssMB",)),
    ),
}
KINDS: dict[str, dict[str, Panels]] = {
    "pretrain": {
        "Training": (Curves("Loss", ("loss",)), Curves("Loss over samples seen", ("loss",), x="samples_seen")),
        "What is learned": (
            Curves("Online evaluation, balanced accuracy", ("eval_knn", "eval_linear")),
            Curves("Effective rank of the embeddings (collapse: towards 1)", ("effective_rank",)),
            Curves("Spread of the embeddings (collapse: 0)", ("embedding_std",)),
            Curves("Alignment of the views", ("alignment",)),
            Curves("Uniformity", ("uniformity",)),
        ),
    },
    "finetune": {
        "Training": (Curves("Loss", ("loss",)), Curves("Validation loss", ("validation_loss",))),
        "Validation": (
            Curves("Balanced accuracy", ("validation_balanced_accuracy",)),
            Curves("Intersection over union", ("validation_iou",)),
        ),
    },
    "pairvae": {
        "Training": (
            Curves("Loss", ("loss",)),
            Curves("From one to the other", ("term_saxs_sem", "term_sem_saxs")),
            Curves("From each to itself", ("term_saxs_saxs", "term_sem_sem")),
            Curves("Physics of the generated pattern", ("term_physics",)),
        ),
        "Latent space": (
            Curves("Divergence from the prior", ("term_kl_saxs", "term_kl_sem", "term_kl")),
            Curves("Coupling of both latents", ("term_coupling",)),
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
            panels=[_curves(reports, drawn) for drawn in panels],
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


def _curves(reports: Any, drawn: Curves) -> Any:
    return reports.LinePlot(title=drawn.title, x=drawn.x, y=[sectioned(name) for name in drawn.metrics])


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
