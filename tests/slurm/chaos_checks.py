"""What has to hold after a training was disturbed, and how far it held."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hpc.checkpoint.files import fault
from tests.slurm.chaos_preempt import KINDS, Event
from tests.slurm.chaos_run import EVERY_STEPS, Run, Start

ONE_STEP_LIMIT = 1e-6


@dataclass(frozen=True)
class Row:
    """A promise, what was measured, and whether it was kept."""

    promise: str
    measured: str
    kept: bool


@dataclass(frozen=True)
class Strike:
    """What one event cost.

    Attributes:
        event: the kill or preemption.
        phase: in which it really came, by the log of the ranks.
        lost: steps that rank 0 had finished and that were done again; ``None`` where the start had done none.
        in_flight: steps that had passed since the checkpoint that was being written, and was lost.
        restarted_s: from the event to the first process of the next start.
        recovered_s: from the event to the first step after it; ``None`` where that start did none.
    """

    event: Event
    phase: str
    lost: int | None
    in_flight: int
    restarted_s: float
    recovered_s: float | None


def strikes(run: Run, events: Sequence[Event]) -> list[Strike]:
    """What each event cost, from the log of the ranks."""
    starts, found = run.starts(), []
    by_number = {start.restart: start for start in starts}
    for event in events:
        start = by_number[event.number]
        following = next(s for s in starts if s.restart > event.number)
        done, flying = start.last_step(), start.in_flight()
        # A start that did no step has none to lose; a following one that did none was killed at start-up itself.
        resumed = next((first for s in starts if s.restart > event.number and (first := s.first_step())), None)
        lost = None if done is None or resumed is None else max(0, done - (resumed - 1))
        first_step = following.first_step()
        stepped = None if first_step is None else following.steps[0][first_step]["time"] - event.at
        passed = max(0, done - flying) if done and flying else 0
        found.append(Strike(event, _phase(event, start), lost, passed, following.began - event.at, stepped))
    return found


def _phase(event: Event, start: Start) -> str:
    """In which phase a kill really came, by the log of rank 0."""
    if event.phase in KINDS:
        return event.phase
    stepped = any(line["time"] <= event.at for line in start.steps.get(0, {}).values())
    if event.phase == "start-up" or not stepped:
        return "steps" if stepped else "start-up"
    begun = {line["of"] for line in start.writes if line["write"] == "begin" and line["time"] <= event.at}
    ended = {line["of"] for line in start.writes if line["write"] == "end" and line["time"] <= event.at}
    if begun - ended:
        return "write"
    return "after a save" if event.phase == "write" else event.phase


def same_curve(run: Run, reference: Run) -> Row:
    """Loss, learning rate and embedding measures of the surviving history, bit for bit."""
    curve, want = run.curve(), reference.curve()
    apart = sum(a != b for a, b in zip(curve, want, strict=False)) + abs(len(curve) - len(want))
    return Row("the curve is the undisturbed one bit for bit", f"{len(want)} steps, {apart} differ", apart == 0)


def near_curve(run: Run, reference: Run) -> Row:
    """How far the surviving curve is from the undisturbed one, where the number of ranks changed; for information."""
    pairs = list(zip(run.curve(), reference.curve(), strict=False))
    worst = max(abs(a[1] - b[1]) / abs(b[1]) for a, b in pairs)
    whole = len(run.curve()) == len(reference.curve()) == pairs[-1][0][0]
    return Row("every step was trained once", f"{len(pairs)} steps; loss apart by {worst:.1e} at most", whole)


def same_samples(run: Run, reference: Run) -> Row:
    """Sample ids by step."""
    samples, want = run.samples(), reference.samples()
    apart = sum(samples.get(step) != want.get(step) for step in samples.keys() | want.keys())
    batch = {len(keys) for keys in want.values()}
    return Row("sample ids are the undisturbed ones", f"{len(want)} steps of {batch}, {apart} differ", apart == 0)


def nothing_twice(run: Run) -> Row:
    """A preempted start saves what it did."""
    steps = run.logged_steps()
    return Row(
        "no step is lost", f"{len(steps)} logged, {len(steps) - len(set(steps))} twice", steps == sorted(set(steps))
    )


def bounded_loss(found: Sequence[Strike]) -> Row:
    """Lost work: one interval, and what passed while a write was in flight."""
    known = [s for s in found if s.lost is not None]
    over = [s for s in known if (s.lost or 0) > EVERY_STEPS + s.in_flight]
    most, flying = max((s.lost or 0 for s in known), default=0), max((s.in_flight for s in found), default=0)
    text = f"at most {most} steps lost, of them at most {flying} while a write was in flight; {len(over)} beyond"
    return Row(f"lost work is at most {EVERY_STEPS} steps and those during a write", text, not over)


def common_states(starts: Sequence[Start]) -> list[Row]:
    """Steps that two starts took from one state: bit for bit on as many ranks, to 1e-6 on other numbers."""
    same, other, broken = 0, [], 0
    for first, second in _pairs(starts):
        begin = second.first_step() or 0
        one, two = first.steps[0], second.steps[0]
        if first.world == second.world:
            shared = sorted(one.keys() & two.keys())
            same += len(shared)
            broken += sum(one[s]["loss"] != two[s]["loss"] for s in shared)
        elif begin in one:
            other.append(abs(one[begin]["loss"] - two[begin]["loss"]) / abs(one[begin]["loss"]))
    rows = [
        Row("steps done again on as many ranks are bit for bit the same", f"{same} steps, {broken} differ", not broken)
    ]
    if other:
        text = f"{len(other)} hand-overs, loss apart by {max(other):.1e} at most"
        rows.append(Row("one step on another number of ranks agrees to 1e-6", text, max(other) <= ONE_STEP_LIMIT))
    return rows


def _pairs(starts: Sequence[Start]) -> Iterable[tuple[Start, Start]]:
    """A start and the one that did its lost steps again."""
    trained = [start for start in starts if start.steps.get(0)]
    return itertools.pairwise(trained)


def resumed_by_itself(run: Run, events: Sequence[Event]) -> Row:
    """Every event is followed by a start, and none comes without one; the last one completes."""
    record = run.record()["starts"]
    restarts = run.restarts()
    text = f"{len(events)} events, {restarts} restarts; the last start {record[-1]['reason']}"
    good = restarts == len(events) and record[-1]["reason"] == "completed"
    return Row("resumes by itself, once for each event", text, good)


def whole_checkpoints(run: Run) -> Row:
    """All checkpoints that are there agree with their hashes, and nothing half-written is left."""
    folder = run.path / "checkpoints"
    faults = [problem for path in sorted(folder.glob("step-*")) if (problem := fault(path))]
    left = [path.name for path in folder.glob(".*")]
    text = f"{len(list(folder.glob('step-*')))} checkpoints, {len(faults)} broken, {len(left)} leftovers"
    return Row("checkpoints are whole", text, not faults and not left)


def recovery(found: Sequence[Strike], by: str = "cause") -> list[tuple[str, ...]]:
    """Median and largest recovery time by cause: a header, and a line for each."""
    lines: list[tuple[str, ...]] = [
        (by, "times", "most steps lost", "to the next start, median s", "to the next step, median s", "largest s")
    ]
    groups: dict[str, list[Strike]] = {}
    for strike in found:
        groups.setdefault(f"{strike.event.target}, {strike.phase}", []).append(strike)
    for name, group in sorted(groups.items()):
        restarted = statistics.median(s.restarted_s for s in group)
        done = [s.recovered_s for s in group if s.recovered_s is not None]
        times = (f"{statistics.median(done):.0f}", f"{max(done):.0f}") if done else ("-", "-")
        lost = max((s.lost for s in group if s.lost is not None), default=0)
        lines.append((name, str(len(group)), str(lost), f"{restarted:.0f}", *times))
    return lines
