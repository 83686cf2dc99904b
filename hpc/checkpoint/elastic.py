"""Training state by parameter *name*, gathered from and scattered to any ZeRO stage and any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hpc import zero3
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
    states = _base_optimizer(engine).state
    slots = _slots(states)
    reader = _reader(engine)
    model = {name: tensor.detach() for name, tensor in engine.module.state_dict().items()}
    optimizer: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            if engine.zero_stage == 3:
                model[name] = _frozen(parameter)
            continue
        if engine.zero_stage:
            model[name] = reader(parameter, None)
        for slot in slots:
            optimizer[f"{slot}/{name}"] = reader(parameter, slot)
    return {"model": model, "optimizer": optimizer}


def _reader(engine: Engine) -> Callable[[nn.Parameter, str | None], Tensor]:
    """What reads the whole weight (slot ``None``) or optimizer state of a parameter."""
    if engine.zero_stage == 0:
        states = _base_optimizer(engine).state
        return lambda parameter, slot: parameter if slot is None else states[parameter][slot]
    if engine.zero_stage == 3:
        return lambda parameter, slot: zero3.read(engine.optimizer, parameter, slot)
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    _link(engine)
    return lambda parameter, slot: (
        safe_get_full_fp32_param(parameter) if slot is None else safe_get_full_optimizer_state(parameter, slot)
    )


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
