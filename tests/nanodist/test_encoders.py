import json

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from hpc.checkpoint import files
from hpc.errors import UserError
from nanodist.encoders import EncoderSpec, create_trunk, load_encoder, random_encoder, resized

SPEC = EncoderSpec("test_resnet", 32, 0.4, 0.2, "image", looks=[(1.0, 0, 8), (0.5, 32, 1)])
IMAGES = list(np.random.default_rng(0).integers(0, 256, (5, 40, 40)).astype(np.uint8))


def test_embedding_does_not_depend_on_the_batch():
    encoder = random_encoder(SPEC, 0)
    whole = encoder.embed(IMAGES)
    assert whole.shape == (5, 2 * encoder.trunk.num_features) and whole.dtype == np.float32
    np.testing.assert_allclose(encoder.embed(iter(IMAGES), batch_size=2), whole, atol=1e-5)
    mixed = [IMAGES[0], np.zeros((48, 64), np.uint8), IMAGES[1]]
    np.testing.assert_allclose(encoder.embed(mixed)[[0, 2]], whole[:2], atol=1e-5)


def test_eight_symmetries_make_the_embedding_blind_to_them():
    encoder = random_encoder(EncoderSpec("test_resnet", 32, 0.4, 0.2, looks=[(1.0, 0, 8)]), 0)
    turned = encoder.embed([np.rot90(IMAGES[0]).copy(), IMAGES[0][:, ::-1].copy(), IMAGES[0]])
    np.testing.assert_allclose(turned[:2], turned[[2, 2]], atol=1e-4)
    single = random_encoder(EncoderSpec("test_resnet", 32, 0.4, 0.2), 0)
    plain = single.embed([np.rot90(IMAGES[0]).copy(), IMAGES[0]])
    assert np.abs(plain[0] - plain[1]).max() > 1e-3


def test_own_exposure_makes_brightness_and_contrast_vanish():
    encoder = random_encoder(SPEC, 0)
    image = IMAGES[0] // 2
    brighter = (image.astype(int) * 2).astype(np.uint8)
    a, b = encoder.embed([image, brighter])
    assert np.abs(a - b).max() < 0.1 * np.abs(a).max()


def test_sixteen_bits_are_the_same_scale_as_eight():
    encoder = random_encoder(SPEC, 0)
    wide = IMAGES[0].astype(np.uint16) * 257
    np.testing.assert_allclose(*encoder.embed([wide, IMAGES[0]]), atol=1e-5)


def test_halving_is_an_average():
    x = torch.rand(1, 1, 16, 16)
    torch.testing.assert_close(resized(x, 0.25), torch.nn.functional.avg_pool2d(x, 4))
    assert resized(x, 0.75).shape[-1] == 12 and resized(x, 1.0) is x


def test_seed_decides_the_weights_and_the_hash():
    a, b, c = (random_encoder(SPEC, seed) for seed in (0, 0, 1))
    assert a.weights_hash() == b.weights_hash() != c.weights_hash()
    before = torch.get_rng_state()
    create_trunk("test_resnet", 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_mistakes_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="timm has no model 'resnet81'"):
        create_trunk("resnet81", 0)
    with pytest.raises(UserError, match="cannot make 'test_resnet'"):
        create_trunk("test_resnet", 0, colour="red")
    with pytest.raises(UserError, match="no such folder"):
        load_encoder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither a run directory"):
        load_encoder(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        load_encoder(tmp_path)
    with pytest.raises(UserError, match="must be uint8 or uint16, not float64"):
        random_encoder(SPEC, 0).embed([np.zeros((8, 8))])


def test_a_checkpoint_is_an_encoder(tmp_path):
    from dataclasses import asdict

    encoder = random_encoder(SPEC, 3)
    weights = {f"trunk.{name}": t for name, t in encoder.trunk.state_dict().items()}
    task = {"encoder": json.loads(json.dumps(asdict(SPEC))), "seen": {"manifest_hash": "h", "groups": ["g"]}}
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    files.write(run / "checkpoints", 7, {"model": {**weights, "projector.0.weight": torch.ones(2)}}, {"task": task}, 1)
    loaded = load_encoder(run)
    assert loaded.weights_hash() == encoder.weights_hash() and loaded.name == "run"
    assert loaded.seen == {"manifest_hash": "h", "groups": ["g"], "run": "run", "step": 7}
    task["encoder"]["trunk"] = "test_vit"
    files.write(run / "checkpoints", 8, {"model": weights}, {"task": task}, 1)
    with pytest.raises(UserError, match="do not fit trunk 'test_vit'"):
        load_encoder(run)


def test_weights_of_imagenet_in_a_file_are_an_encoder(tmp_path):
    # What torchvision and timm publish: three colours, a classifier, and in old files no counters of BatchNorm.
    torch.manual_seed(3)
    published = timm.create_model("test_resnet", in_chans=3, num_classes=1000).eval()
    weights = published.state_dict()
    save_file(weights, tmp_path / "new.safetensors")
    old = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    torch.save({"state_dict": old}, tmp_path / "old.pth")
    new, same = (load_encoder(f"timm:test_resnet@{tmp_path / name}") for name in ("new.safetensors", "old.pth"))
    assert new.weights_hash() == same.weights_hash() and new.name == "test_resnet"
    pixels = torch.from_numpy(np.stack(IMAGES).astype(np.float32) / 255)[:, None]
    grey = (pixels - pixels.mean((-2, -1), keepdim=True)) / (pixels.std((-2, -1), keepdim=True, correction=0) + 1e-3)
    with torch.inference_mode():
        colours = published.forward_head(published.forward_features(grey.expand(-1, 3, -1, -1)), pre_logits=True)
    np.testing.assert_allclose(new.embed(IMAGES), colours.numpy(), atol=1e-4)

    theirs = torchvision.models.resnet18().eval()
    theirs.bn1.running_mean.normal_()  # as after a training
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    theirs.fc = torch.nn.Identity()
    with torch.inference_mode():
        features = theirs(grey.expand(-1, 3, -1, -1))
    np.testing.assert_allclose(
        load_encoder(f"timm:resnet18@{tmp_path / 'theirs.pth'}").embed(IMAGES), features, atol=1e-4
    )

    (tmp_path / "notes.pth").write_text("none")
    wrong = [
        ("test_resnet@" + str(tmp_path / "none.pth"), "no such file of weights"),
        ("test_resnet@" + str(tmp_path / "notes.pth"), "cannot be read as weights"),
        ("resnet18@" + str(tmp_path / "old.pth"), "the weights do not fit timm's 'resnet18'"),
    ]
    for source, said in wrong:
        with pytest.raises(UserError, match=said):
            load_encoder(f"timm:{source}")
    with pytest.raises(UserError, match="say the timm model too"):
        load_encoder(tmp_path / "old.pth")
