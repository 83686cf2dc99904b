import numpy as np
from PIL import Image

from nanodist.shards import GroupPartners, Loader, Order, PackOptions, pack


def _store(tmp_path):
    for group in range(6):
        (tmp_path / "images" / f"g{group}").mkdir(parents=True)
        for i in range(group + 1):
            pixels = np.random.default_rng(10 * group + i).integers(0, 255, (16, 16)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"g{group}" / f"{i}.png")
    return pack([tmp_path / "images"], tmp_path / "store", PackOptions(tile=16), groups="folder")


def test_a_partner_is_of_the_same_group_and_keyed(tmp_path):
    store = _store(tmp_path)
    partners = GroupPartners(store, 0)
    indices = np.arange(len(store)).repeat(50)
    epochs = np.tile(np.arange(50), len(store))
    chosen = partners(epochs, indices)
    assert all(store.groups[a] == store.groups[b] for a, b in zip(indices, chosen, strict=True))
    for i in range(len(store)):
        assert len(set(chosen[indices == i])) == store.groups.count(store.groups[i])
    one = np.array([7])
    assert partners(epochs[7 * 50 + 3 : 7 * 50 + 4], one) == chosen[7 * 50 + 3]


def test_partners_do_not_depend_on_ranks_and_the_cache_changes_nothing(tmp_path):
    store = _store(tmp_path)
    order = Order(len(store), 0, 8)
    for cache_mb in (0, 1):
        whole = Loader(store, order, 0, 1, partners=GroupPartners(store, 0), cache_mb=cache_mb)
        halves = [Loader(store, order, rank, 2, workers=1, partners=GroupPartners(store, 0)) for rank in (0, 1)]
        for _ in range(6):
            one, parts = next(whole), [next(half) for half in halves]
            assert np.array_equal(one.partners, np.concatenate([p.partners for p in parts]))
            assert np.array_equal(one.images, np.concatenate([p.images for p in parts]))
            assert np.array_equal(one.images[3], store.read(int(one.indices[3])))
        for half in halves:
            half.close()
