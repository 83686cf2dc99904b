"""Training state by parameter *name*, gathered from and scattered to any ZeRO stage and any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hpc import zero3
from hpc.checkpoint import partitions
from hpc.checkpoint.files import CheckpointError
from hpc.engine import Engine


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _slots(states: dict[Any, dict[str, Any]]) -> list[str]:
    """Names of the optimizer's tensors a parameter, such as ``exp_avg``; scalars such as ``step`` are left out."""
    names = {k for state in states.values() for k, v in state.items() if torch.is_tensor(v) and v.dim() > 0}
    return sorted(names)


def _base_optimizer(engine: Engine) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)  # type: ignore[no-any-return]


def gather(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """``{"model": weights and buffers, "optimizer": "<slot>/<name>" -> tensor}``, whole, on every rank.

    Collective: every rank has to call it.
    """
    if engine.zero_stage not in (1, 2):
        return _gather(engine, lambda slot: _states(engine, slot))
    return _gather(engine, lambda slot: partitions.to_all(engine.optimizer, slot))


def gather_on_main(engine: Engine, room: partitions.Room | None) -> dict[str, dict[str, Tensor]]:
    """As :func:`gather`, for a checkpoint: what ranks other than rank 0 get is of no use. Collective.

    Args:
        engine: of any stage.
        room: on rank 0, gives memory of the host for what has to be gathered at ZeRO 1 and 2; ``None`` on all others.
    """
    if engine.zero_stage not in (1, 2):
        return gather(engine)
    slots = _slots(_base_optimizer(engine).state)
    whole = partitions.to_main(engine.optimizer, slots, room, staged=engine.device.type == "cuda")
    return _gather(engine, lambda slot: whole.get(slot, {}))


def _gather(engine: Engine, states_of: Callable[[str], Mapping[nn.Parameter, Tensor]]) -> dict[str, dict[str, Tensor]]:
    # Below ZeRO 3 the weights of every rank are whole, and float32, so that they are the master weights.
    model = {name: tensor.detach() for name, tensor in engine.module.state_dict().items()}
    trained = _trained(engine.module)
    if engine.zero_stage == 3:
        for name, parameter in engine.module.named_parameters():
            model[name] = zero3.read(engine.optimizer, parameter) if name in trained else _frozen(parameter)
    optimizer: dict[str, Tensor] = {}
    for slot in _slots(_base_optimizer(engine).state):
        states = states_of(slot)
        optimizer |= {f"{slot}/{name}": states[parameter] for name, parameter in trained.items() if parameter in states}
    return {"model": model, "optimizer": optimizer}


def _states(engine: Engine, slot: str) -> dict[nn.Parameter, Tensor]:
    """A state of each parameter at ZeRO 0 and 3."""
    trained = _trained(engine.module).values()
    if engine.zero_stage == 3:
        return {parameter: zero3.read(engine.optimizer, parameter, slot) for parameter in trained}
    states = _base_optimizer(engine).state
    return {parameter: states[parameter][slot] for parameter in trained if slot in states[parameter]}


def _frozen(parameter: nn.Parameter) -> Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def optimizer_steps(engine: Engine) -> float:
    """The optimizer's own count of steps (AdamW's bias correction), 0 before the first."""
    counts = [float(s["step"]) for s in _base_optimizer(engine).state.values() if "step" in s]
    return max(counts, default=0.0)


@torch.no_grad()
def scatter(engine: Engine, model: dict[str, Tensor], optimizer: dict[str, Tensor], steps: float) -> None:
    """Put a gathered state into an engine of any stage and number of ranks.

    Raises:
        CheckpointError: names or shapes differ from the engine's; the first difference is named.
    """
    _check_names(engine.module, model)
    if engine.zero_stage == 3:
        _scatter_weights_too(engine, model, optimizer, steps)
        return
    engine.module.load_state_dict(model)
    if engine.zero_stage:
        _scatter_partitioned(engine, model, optimizer, steps)
        return
    states = _base_optimizer(engine).state
    for name, parameter in _trained(engine.module).items():
        slots = {key.split("/", 1)[0]: v for key, v in optimizer.items() if key.split("/", 1)[1] == name}
        if not slots:
            continue
        states[parameter] = {slot: v.to(parameter.device, parameter.dtype).clone() for slot, v in slots.items()}
        if "exp_avg" in slots:
            # Fused AdamW keeps its step count beside the parameters.
            states[parameter]["step"] = torch.tensor(steps, dtype=torch.float32, device=parameter.device)


def _link(engine: Engine) -> None:
    """Tell DeepSpeed where each parameter lies in the optimizer's flat states.

    It does so itself after the step of the first parameter group, when the states of the others do not exist yet, so
    theirs would be missing.
    """
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()


def _empty_states(engine: Engine, flats: list[Tensor], optimizer: dict[str, Tensor], steps: float) -> None:
    """States of the flat tensors that ZeRO steps on, to be filled."""
    slots = {key.split("/", 1)[0] for key in optimizer}
    for flat in flats:
        state: dict[str, Tensor] = {slot: torch.zeros_like(flat) for slot in sorted(slots)}
        if "exp_avg" in slots:
            state["step"] = torch.tensor(steps, dtype=torch.float32, device=flat.device)
        _base_optimizer(engine).state[flat] = state


def _scatter_partitioned(engine: Engine, model: dict[str, Tensor], optimizer: dict[str, Tensor], steps: float) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    groups = _base_optimizer(engine).param_groups
    _empty_states(engine, [flat for group in groups for flat in group["params"]], optimizer, steps)
    _link(engine)
    trained = _trained(engine.module)
    for name, parameter in trained.items():
        safe_set_full_fp32_param(parameter, model[name].to(engine.device))
    for key, value in optimizer.items():
        slot, owner = key.split("/", 1)
        if owner in trained:
            safe_set_full_optimizer_state(trained[owner], value.to(engine.device), slot)


def _scatter_weights_too(engine: Engine, model: dict[str, Tensor], optimizer: dict[str, Tensor], steps: float) -> None:
    import deepspeed

    zero = engine.optimizer
    for name, buffer in engine.module.named_buffers():
        if name in model:
            buffer.copy_(model[name])
    _empty_states(engine, zero3.holders(zero), optimizer, steps)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            zero3.write(zero, parameter, model[name].to(engine.device))
            continue
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if engine.topology.is_main:
                parameter.data.copy_(model[name])
    trained = _trained(engine.module)
    for key, value in optimizer.items():
        slot, owner = key.split("/", 1)
        if owner in trained:
            zero3.write(zero, trained[owner], value.to(engine.device), slot)
    zero3.publish(zero)


def _check_names(module: nn.Module, model: dict[str, Tensor]) -> None:
    own = {name: tensor.shape for name, tensor in module.state_dict().items()}
    own |= {name: zero3.full_shape(parameter) for name, parameter in module.named_parameters()}
    for name in [*own, *model]:
        if name not in model or name not in own:
            where = "the checkpoint" if name not in model else "the model"
            raise CheckpointError(f"'{name}' is missing in {where}")
        if own[name] != model[name].shape:
            raise CheckpointError(f"'{name}' has shape {tuple(model[name].shape)}, not {tuple(own[name])}")
