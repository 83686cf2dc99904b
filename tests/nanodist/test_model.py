import shutil
from types import SimpleNamespace

import pytest
import torch

from hpc.batch_norm import GroupedBatchNorm, Layout
from hpc.config import apply_overrides, build
from hpc.errors import UserError
from nanodist.encoders import EncoderSpec, create_trunk, random_encoder
from nanodist.export.weights import export_timm
from nanodist.pretrain.data import identity
from nanodist.pretrain.model import build_model
from nanodist.pretrain.preflight_needs import model_size
from nanodist.pretrain.recipe import PretrainRecipe, load_recipe, packaged_recipes

BASE = ["encoder.trunk=resnet10t", "projector.widths=[16, 8]", "train.channels_last=false"]


def _recipe(*overrides):
    return build(PretrainRecipe, apply_overrides({}, [*BASE, *overrides]))


def _model(*overrides):
    recipe = _recipe(*overrides)
    return build_model(recipe, recipe.encoder_spec(0.5, 0.2), Layout(4, 4))


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = _model().state_dict()
    torch.manual_seed(2)
    second = _model().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = _model("seed=1").state_dict()
    assert not torch.equal(first["trunk.conv1.0.weight"], other["trunk.conv1.0.weight"])
    assert not torch.equal(first["projector.0.weight"], other["projector.0.weight"])


def test_every_batch_norm_is_grouped_and_views_do_not_mix():
    model = _model()
    assert not any(isinstance(m, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)) for m in model.modules())
    assert any(isinstance(m, GroupedBatchNorm) for m in model.projector)
    views = torch.rand(2, 4, 1, 32, 32)
    a, b = model(views)
    assert a.shape == b.shape == (4, 8)
    again, _ = model(torch.stack([views[0], 5 * views[1]]))
    assert torch.equal(a, again)


def test_batch_norm_over_both_views_mixes_them_sample_by_sample():
    recipe = build(PretrainRecipe, apply_overrides({}, [*BASE, "train.bn_views=both", "train.precision=fp64"]))
    # Groups of two samples: four rows, the two views of a sample following each other.
    model = build_model(recipe, recipe.encoder_spec(0.5, 0.2), Layout(4, 8))
    views = torch.rand(2, 4, 1, 32, 32, dtype=torch.float64)
    a, b = model(views)
    changed = views.clone()
    changed[1, 3] *= 2
    other_a, other_b = model(changed)
    assert torch.equal(a[:2], other_a[:2]) and torch.equal(b[:2], other_b[:2])
    assert not torch.allclose(a[2:], other_a[2:])
    swapped_b, swapped_a = model(views.flip(0))
    torch.testing.assert_close(swapped_a, a)
    torch.testing.assert_close(swapped_b, b)


def test_precision_is_the_recipes():
    views = torch.rand(2, 4, 1, 32, 32)
    for precision, expected in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp64", torch.float64)):
        model = _model(f"train.precision={precision}")
        out, _ = model(views)
        out.float().sum().backward()
        assert out.dtype == expected
        kinds = {p.grad.dtype for p in model.parameters() if p.grad is not None}
        assert kinds == {torch.float64 if precision == "fp64" else torch.float32}


def test_warm_start_takes_the_trunk_of_an_export(tmp_path):
    encoder = random_encoder(EncoderSpec("resnet10t", 32, 0.5, 0.2), seed=77)
    expected = {name: t.clone() for name, t in encoder.trunk.state_dict().items()}
    export_timm(encoder, tmp_path / "e", {"name": "e"})
    model = _model(f"init_from={tmp_path / 'e'}").state_dict()
    assert all(torch.equal(model[f"trunk.{name}"], t) for name, t in expected.items())
    with pytest.raises(UserError, match="does not fit trunk 'resnet14t'"):
        _model(f"init_from={tmp_path / 'e'}", "encoder.trunk=resnet14t")
    # A run is known by the weights that it begins with, wherever they lie.
    store = SimpleNamespace(manifest_hash="m")
    shutil.copytree(tmp_path / "e", tmp_path / "moved")
    export_timm(random_encoder(EncoderSpec("resnet10t", 32, 0.5, 0.2), seed=78), tmp_path / "other", {"name": "e"})
    file = tmp_path / "e" / "model.safetensors"
    known = [
        identity(_recipe(f"init_from={source}"), store)[0]
        for source in (tmp_path / "e", tmp_path / "moved", tmp_path / "other", f"timm:resnet10t@{file}")
    ]
    assert known[0] == known[1] and len(set(known)) == 3
    with pytest.raises(UserError, match="no such folder"):
        _model("init_from=nowhere")


def test_warm_start_by_name_asks_timm_for_its_weights(monkeypatch):
    donor = create_trunk("resnet10t", 5)
    asked = []

    def create(name, seed, pretrained=False, **options):
        asked.append((name, pretrained))
        return donor if pretrained else create_trunk(name, seed, **options)

    monkeypatch.setattr("nanodist.encoders.create_trunk", create)
    model = _model("init_from=timm:resnet10t.c3_in1k").state_dict()
    assert ("resnet10t.c3_in1k", True) in asked
    assert torch.equal(model["trunk.conv1.0.weight"], donor.state_dict()["conv1.0.weight"])


@pytest.mark.parametrize(
    ("trunk", "options"),
    [
        ("convnext_atto", "{drop_path_rate: 0.1}"),
        ("convnext_atto", "{drop_rate: 0.2}"),
        ("resnet10t", "{drop_rate: 0.2}"),
        ("test_vit", "{patch_drop_rate: 0.3}"),
    ],
)
def test_randomness_that_is_not_keyed_is_refused(trunk, options):
    with pytest.raises(UserError, match="drops at random"):
        _model(f"encoder.trunk={trunk}", f"encoder.trunk_options={options}")


@pytest.mark.parametrize("trunk", ["mobilenetv3_small_050", "lcnet_035", "test_resnet"])
def test_the_projector_takes_what_the_trunk_gives(trunk):
    """Some of timm's trunks end in a layer that is wider than ``num_features``."""
    model = _model(f"encoder.trunk={trunk}", "views.size_px=64")
    assert model.training
    assert all(z.shape == (4, 8) for z in model(torch.rand(2, 4, 1, 64, 64)))
    assert model_size(_recipe(f"encoder.trunk={trunk}", "views.size_px=64")).unknown == ""


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("encoder.trunk_options={checkpoint_path: w.pth}", "'checkpoint_path' loads weights; give them by init_from"),
        ("encoder.trunk_options={pretrained: true}", "'pretrained' loads weights"),
        ("encoder.trunk_options={seed: 3}", "'seed' is set by the recipe itself"),
        ("encoder.looks=[[0.01, 0, 8]]", "scale 1/64 to 64"),
    ],
)
def test_an_encoder_that_could_not_be_loaded_again_is_refused(override, said):
    with pytest.raises(UserError, match=said):
        _recipe(override)


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_are_whole(name):
    recipe = load_recipe(name, [])
    assert recipe.train.total_steps(1000) > 0 and recipe.train.global_batch_size % recipe.bn_group_size() == 0
    create_trunk(recipe.encoder.trunk, 0, **recipe.encoder.trunk_options)


def test_activations_made_again_give_the_same_gradient():
    grads = []
    vit = "encoder.trunk=vit_tiny_patch16_224"
    for extra in ("encoder.checkpointing=false", "encoder.checkpointing=true"):
        options = "encoder.trunk_options={img_size: 32, depth: 2}"
        model = _model(vit, options, extra, "train.precision=fp64").train()
        a, b = model(torch.rand(2, 4, 1, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        (a * b).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(grads[1][name], grad, rtol=1e-12) for name, grad in grads[0].items())
    with pytest.raises(UserError, match="has BatchNorm, whose statistics would be seen twice"):
        _model("encoder.checkpointing=true")


def test_a_compiled_trunk_keeps_its_names_and_values():
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    vit = ["encoder.trunk=vit_tiny_patch16_224", "encoder.trunk_options={img_size: 32, depth: 1}"]
    plain, compiled = _model(*vit), _model(*vit, "train.compile=true")
    assert list(plain.state_dict()) == list(compiled.state_dict())
    views = torch.rand(2, 4, 1, 32, 32)
    for one, other in zip(plain(views), compiled(views), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_warm_start_from_a_deepspeed_checkpoint(tmp_path):
    donor = create_trunk("resnet10t", 5)
    module = {f"module.backbone.{name}": tensor for name, tensor in donor.state_dict().items()}
    module["module.head.weight"] = torch.zeros(3, 3)
    (tmp_path / "global_step7").mkdir()
    torch.save({"module": module}, tmp_path / "global_step7" / "mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_text("global_step7")
    model = _model(f"init_from=deepspeed:{tmp_path}").state_dict()
    assert all(torch.equal(model[f"trunk.{name}"], t) for name, t in donor.state_dict().items())
    with pytest.raises(UserError, match="does not fit trunk 'resnet14t'"):
        _model(f"init_from=deepspeed:{tmp_path}", "encoder.trunk=resnet14t")


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_are_laid_out_as_the_recipe_says(channels_last):
    """One channel looks the same in both layouts, and the first convolution must not take it for the other one."""
    model = _model(f"train.channels_last={str(channels_last).lower()}")
    seen = []
    model.trunk.conv1[0].register_forward_hook(lambda *call: seen.append(call[2]))
    model(torch.rand(2, 4, 1, 32, 32))
    assert seen[0].shape[0] == 8 and seen[0].is_contiguous(memory_format=torch.channels_last) == channels_last


def test_weights_are_plain_and_used_as_the_images_lie():
    """Checkpoints and DeepSpeed want them plain; values and gradients are those of torch's own convolution."""
    plain, laid_out = _model(), _model("train.channels_last=true")
    assert all(p.is_contiguous() for p in laid_out.parameters())
    assert list(plain.state_dict()) == list(laid_out.state_dict())
    views = torch.rand(2, 4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    for model in (plain.double(), laid_out.double()):
        sum(z.square().sum() for z in model(views.double())).backward()
    for one, other in zip(plain.parameters(), laid_out.parameters(), strict=True):
        assert other.grad.is_contiguous()
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-9, atol=1e-9)
