"""``python -m tests.benchmarks.bench_loader [--repeats 5] [--rows one,two,decoders,resume,reads,sizes]``.

The loader against its peers, in turns in one run, on 256 x 256 tiles in the page cache; medians of ratios. ``one`` is
one thread (processor time), ``two`` is wall time with two workers. MosaicML Streaming is measured where it can be
imported. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nanodist.decoding.reading import BLOCK_BYTES
from nanodist.shards import Loader, Order, Store, make_order
from tests.benchmarks.loader_stores import TILE, foreign, multiplied, packed, small_tiles, tiles

BATCH = 250
# (what, over which peer, at least)
BARS = {
    ("raw", "webdataset"): 4.0,
    ("raw", "plain read"): 0.3,
    ("tif", "webdataset png"): 3.0,
    ("png", "webdataset png"): 1.8,
    ("png of Pillow", "webdataset png of Pillow"): 1.8,
    ("jpg", "webdataset jpg"): 2.5,
    ("jpg of Pillow", "webdataset jpg of Pillow"): 2.5,
}


def ours(store: Store) -> Callable[[], None]:
    """All samples of a store through the loader, into one buffer."""
    buffer = np.empty((BATCH, TILE, TILE), np.uint8)
    loader = Loader(store, Order(len(store), 0, BATCH), 0, 1, allocate=lambda shape, dtype: buffer)

    def run() -> None:
        for _ in range(len(store) // BATCH):
            next(loader)

    return run


def plain_read(store: Store) -> Callable[[], None]:
    """The files from end to end, into a buffer of a batch."""
    buffer = bytearray(BATCH * TILE * TILE)

    def run() -> None:
        for shard in store.manifest.shards:
            with open(store.path / shard.file, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    return run


def urls_of(store: Store) -> list[str]:
    return [str(store.path / shard.file) for shard in store.manifest.shards]


def webdataset_raw(store: Store) -> Callable[[], None]:
    """webdataset's cheapest pipeline: tar members as bytes, copied into a buffer."""
    import webdataset

    buffer = np.empty((BATCH, TILE * TILE), np.uint8)

    def run() -> None:
        for i, sample in enumerate(webdataset.WebDataset(urls_of(store), shardshuffle=False)):
            buffer[i % BATCH] = np.frombuffer(sample["pgm"], np.uint8)[-TILE * TILE :]

    return run


def webdataset_l(store: Store, suffix: str) -> Callable[[], None]:
    """``decode("l")``, copied into a buffer."""
    import webdataset

    buffer = np.empty((BATCH, TILE, TILE), np.float32)

    def run() -> None:
        for i, sample in enumerate(webdataset.WebDataset(urls_of(store), shardshuffle=False).decode("l")):
            buffer[i % BATCH] = sample[suffix]

    return run


def loose_png(folder: Path) -> Callable[[], None]:
    """Single PNGs under a torch DataLoader without workers."""
    from PIL import Image
    from torch.utils.data import DataLoader

    class Loose:
        def __init__(self) -> None:
            self.paths = sorted(folder.iterdir())

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, i: int) -> Any:
            return np.asarray(Image.open(self.paths[i]))

    loader: Any = DataLoader(Loose(), BATCH, shuffle=True)  # type: ignore[arg-type]
    return lambda: [None for _ in loader] and None


def streaming(folder: Path, pixels: list[np.ndarray], kind: str) -> Callable[[], None] | None:
    """MosaicML Streaming on raw arrays or PNG, without workers; ``None`` where it is not installed."""
    try:
        from streaming import MDSWriter, StreamingDataset
    except ImportError:
        return None
    from PIL import Image

    column = "ndarray:uint8:256,256" if kind == "raw" else "png"
    with MDSWriter(out=str(folder), columns={"x": column}, size_limit=1 << 24) as writer:
        for tile in pixels:
            writer.write({"x": tile if kind == "raw" else Image.fromarray(tile)})
    buffer = np.empty((BATCH, TILE, TILE), np.uint8)

    def run() -> None:
        dataset: Any = StreamingDataset(local=str(folder), batch_size=BATCH, shuffle=True)
        for i, sample in enumerate(dataset):
            buffer[i % BATCH] = np.asarray(sample["x"])

    return run


def in_turns(runs: dict[str, Callable[[], None]], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each run, one after the other in each turn, after a turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            begun = clock()
            run()
            if turn:
                seconds[name].append(clock() - begun)
    return seconds


def one_core(folder: Path, stores: dict[str, Store], pixels: list[np.ndarray], repeats: int) -> dict[str, Any]:
    """The table of one core."""
    others = {suffix: foreign(folder / "loose", folder / f"foreign-{suffix}", suffix) for suffix in ("png", "jpg")}
    runs: dict[str, Callable[[], None]] = {f"nanodist {name}": ours(store) for name, store in stores.items()}
    for suffix, store in others.items():
        runs[f"nanodist {suffix} of Pillow"] = ours(store)
        runs[f"webdataset {suffix} of Pillow"] = webdataset_l(store, suffix)
    runs["plain read"] = plain_read(stores["raw"])
    runs["webdataset"] = webdataset_raw(stores["raw"])
    runs["webdataset png"] = webdataset_l(stores["png"], "png")
    runs["webdataset jpg"] = webdataset_l(stores["jpg"], "jpg")
    runs["webdataset tif"] = webdataset_l(stores["tif"], "tif")
    runs["loose png, DataLoader"] = loose_png(folder / "loose")
    for kind in ("raw", "png"):
        run = streaming(folder / f"mds-{kind}", pixels, kind)
        if run is not None:
            runs[f"streaming {kind}"] = run
    seconds = in_turns(runs, repeats, time.process_time)
    count = len(stores["raw"])
    print(f"\none core, batches of {BATCH}, processor time\n{'what':26s} images/s")
    for name, values in seconds.items():
        done = count // BATCH * BATCH if name.startswith("nanodist") else count
        print(f"{name:26s} {done / statistics.median(values):8.0f}")
    result = {}
    for (mine, peer), bar in BARS.items():
        own = [s * count / (count // BATCH * BATCH) for s in seconds[f"nanodist {mine}"]]
        ratio = statistics.median(b / a for a, b in zip(own, seconds[peer], strict=True))
        result[f"{mine} over {peer}"] = round(ratio, 3)
        print(f"{mine:13s} over {peer:24s} {ratio:6.2f}x  (must reach {bar}x)")
    return result


def decoders(folder: Path, repeats: int) -> dict[str, Any]:
    """Microseconds that libraries take for a tile, with nothing around them; PNG as Pillow writes it, JPEG of 95."""
    import imagecodecs
    import kornia_rs
    from PIL import Image

    images: dict[str, list[bytes]] = {"png": [], "jpg": []}
    for path in sorted((folder / "loose").iterdir())[:300]:
        images["png"].append(path.read_bytes())
        buffer = io.BytesIO()
        Image.open(path).save(buffer, "JPEG", quality=95, optimize=True)
        images["jpg"].append(buffer.getvalue())
    rust: Any = kornia_rs
    by: dict[str, Callable[[bytes], Any]] = {
        "png libpng": imagecodecs.png_decode,
        "png kornia": lambda data: rust.io.decode_image_png_u8(data, (TILE, TILE), "mono"),
        "jpg libjpeg-turbo": imagecodecs.jpeg8_decode,
        "jpg zune (kornia)": rust.io.decode_image_jpeg,
        "png Pillow": lambda data: np.asarray(Image.open(io.BytesIO(data))),
        "jpg Pillow": lambda data: np.asarray(Image.open(io.BytesIO(data))),
    }

    def over(decode: Callable[[bytes], Any], these: list[bytes]) -> Callable[[], None]:
        return lambda: [decode(data) for data in these] and None

    seconds = in_turns({n: over(f, images[n[:3]]) for n, f in by.items()}, repeats, time.process_time)
    result = {name: round(statistics.median(values) / len(images["png"]) * 1e6) for name, values in seconds.items()}
    print("\ndecoders alone, microseconds a tile: " + ", ".join(f"{name} {us}" for name, us in result.items()))
    return {f"{name} us": us for name, us in result.items()}


def two_workers(stores: dict[str, Store], repeats: int) -> dict[str, Any]:
    """Two workers, and what is chosen by itself, over none; ``none`` is a second loader without workers: the noise."""
    result, turns = {}, 24
    print(f"\nwall time of {turns} batches of 64, over that without workers\nencoding  two  by itself  none")
    for name, store in stores.items():
        choices = {"none": 0, "two": 2, "by itself": None, "none again": 0}
        loaders = {k: Loader(store, Order(len(store), 0, 64), 0, 1, workers=n) for k, n in choices.items()}

        def steps(loader: Loader) -> Callable[[], None]:
            def run() -> None:
                for _ in range(turns):
                    next(loader)  # not kept: a training lets go of a batch before the next but one

            return run

        time.sleep(4)  # processes start, which is no part of a run's speed
        seconds = in_turns({k: steps(loader) for k, loader in loaders.items()}, repeats, time.perf_counter)
        ratios = {
            k: statistics.median(a / b for a, b in zip(seconds["none"], seconds[k], strict=True)) for k in choices
        }
        print(f"{name:8s} {ratios['two']:5.2f} {ratios['by itself']:9.2f} {ratios['none again']:6.2f}")
        result |= {f"{name} {k} over none": round(ratios[k], 3) for k in ("two", "by itself", "none again")}
        for loader in loaders.values():
            loader.close()
    return result


RESUME = """
import sys, time, resource, json
from nanodist.shards import Loader, Store, make_order
def rss():
    lines = [line.split() for line in open('/proc/self/status') if line.startswith(('VmRSS', 'VmHWM'))]
    return {words[0]: int(words[1]) / 1024 for words in lines}
before = rss()['VmRSS:']
path, step, window_mb, cache_mb, more = sys.argv[1], *map(int, sys.argv[2:6])
begun, cpu = time.perf_counter(), time.process_time()
store = Store.open(path)
loader = Loader(store, make_order(store, 0, 1000, window_mb), 0, 1, workers=None, start_step=step, cache_mb=cache_mb)
batch = next(loader)
first, cpu = time.perf_counter() - begun, time.process_time() - cpu
for _ in range(more):
    batch = next(loader)
buffers = 4 * batch.images.nbytes / 2**20
print(json.dumps([first, cpu, rss()['VmHWM:'] - before - buffers, loader.in_blocks]))
"""


def resume(folder: Path, repeats: int) -> dict[str, Any]:
    """First batch anywhere in a million samples, in fresh processes, and memory after 300 more."""
    store = multiplied(small_tiles(folder / "small", 2000), folder / "million", 1_000_000)
    result: dict[str, Any] = {}
    print(f"\n{len(store)} samples: seconds to open the store and have the first batch, worst of {repeats} places")
    for name, window_mb, cache_mb in (("all shuffled", 0, 128), ("window", 768, 128), ("blocks", 48, 128)):
        found = []
        for step in np.random.default_rng(1).integers(1, 3000, repeats).tolist():
            command = [sys.executable, "-c", RESUME, str(store.path), *map(str, (step, window_mb, cache_mb, 300))]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        worst, cpu, memory = (max(values[k] for values in found) for k in range(3))
        print(f"{name:14s} {worst:.2f} s ({cpu:.2f} s of processor), {memory:.0f} MiB over batch buffers and imports")
        result |= {f"resume {name} s": round(worst, 3), f"memory {name} MiB": round(memory)}
    return result


def reads(folder: Path, raw: Store) -> dict[str, Any]:
    """What 16 ranks read in one epoch of a store of 20 windows."""
    store = multiplied(raw, folder / "wide", 40_000)
    window_mb = store.shard_bytes // 20 >> 20
    order = make_order(store, 0, 256, window_mb)
    read = used = calls = 0
    smallest = 1 << 62
    for rank in range(16):
        with Loader(store, order, rank, 16, cache_mb=128) as loader:
            assert loader.in_blocks
            for _ in range(len(store) // 256):
                next(loader)
            traffic = loader.source.files.traffic
        read, used, calls = read + traffic.bytes_read, used + traffic.bytes_used, calls + traffic.reads
        smallest = min(smallest, traffic.smallest_read)
        store = Store.open(store.path)
    print(f"\n16 ranks, one epoch of {store.shard_bytes / 2**30:.1f} GiB in windows of {window_mb} MiB:")
    print(
        f"bytes read over bytes used {read / used:.3f} (at most 1.2); {calls} reads of {read / calls / 2**20:.2f} MiB"
    )
    print(f"in the mean, the smallest {smallest / 2**20:.2f} MiB (at least {BLOCK_BYTES >> 20})")
    return {"read over used": round(read / used, 3), "smallest read MiB": round(smallest / 2**20, 3)}


def sizes(folder: Path, stores: dict[str, Store]) -> dict[str, Any]:
    """Bytes of each encoding over Pillow's PNG, images alone; 16 bits are the same tiles with noise in the low bits."""
    rng = np.random.default_rng(0)
    deep = [t.astype(np.uint16) * 16 + rng.integers(0, 16, t.shape, dtype=np.uint16) for t in tiles(100)]
    both = {8: stores, 16: packed(folder / "deep", deep, 16)}
    places = {8: ".", 16: "deep"}
    result = {}
    print("\nbytes over PNG's    decoded images/s on one core")
    for depth, made in both.items():
        png = float(np.mean([path.stat().st_size for path in (folder / places[depth] / "loose").iterdir()]))
        for name, store in made.items():
            ratio = float(np.mean(store.samples.columns["size"])) / png
            numbers = np.arange(min(100, len(store)))
            speeds = []
            for _ in range(5):
                begun = time.process_time()
                for i in numbers.tolist():
                    store.read(i)
                speeds.append(len(numbers) / (time.process_time() - begun))
            print(f"{depth:2d} bits {name:4s} {ratio:6.3f} {statistics.median(speeds):12.0f}")
            result[f"{name} {depth} bytes over png"] = round(ratio, 4)
    return result


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", default="sizes,one,decoders,two,reads,resume")
    options = parser.parse_args()
    rows, result = options.rows.split(","), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pixels = tiles(options.tiles)
        stores = packed(folder, pixels)
        print(f"{len(stores['raw'])} tiles of {TILE} x {TILE}, 8 bits")
        if "sizes" in rows:
            result |= sizes(folder, stores)
        if "one" in rows:
            result |= one_core(folder, stores, pixels, options.repeats)
        if "decoders" in rows:
            result |= decoders(folder, options.repeats)
        if "two" in rows:
            result |= two_workers(stores, options.repeats)
        if "reads" in rows:
            result |= reads(folder, stores["raw"])
        if "resume" in rows:
            result |= resume(folder, options.repeats)
    sys.stdout.flush()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
