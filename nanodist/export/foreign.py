"""What a recipient's process does with an export: load it by the code of its card, and answer to image files.

Run as a script, never imported: ``python -I foreign.py JOB.json``. It sees the same installed libraries as its parent
but cannot import nanodist, so that an export that secretly needs nanodist fails here and not at the recipient's.
"""

import json
import pathlib
import sys

OURS = ("nanodist", "hpc", "launch")


class Without:
    """Refuses to import nanodist."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """``importlib`` asks here first."""
        if name.split(".")[0] in OURS:
            raise ImportError(f"{name} must not be needed by an export")


def run(task: dict, folder: pathlib.Path) -> dict:
    """Execute ``task["code"]`` and save what it answers to each file as ``NAME-i.npz``; versions, or the error."""
    import numpy as np
    from PIL import Image

    try:
        scope: dict = {}
        exec(compile(task["code"], f"card of {task['name']}", "exec"), scope)
        answer = scope[task["function"]]
        for i, file in enumerate(task["images"]):
            pixels = np.asarray(Image.open(file))
            if pixels.dtype != np.float32:
                pixels = pixels if pixels.dtype == np.uint8 else pixels.astype(np.uint16)
            found = answer(pixels)
            found = found if isinstance(found, (list, tuple)) else [found]
            np.savez(folder / f"{task['name']}-{i}.npz", *[np.asarray(one, np.float32) for one in found])
    except Exception as error:  # the parent says which format failed, and why
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    used = [name for name in task["libraries"] if name in sys.modules]
    return {"loaded_with": {name: str(sys.modules[name].__version__) for name in used}}


def main(job_file: pathlib.Path) -> None:
    """Do every task of the job and write ``results.json`` beside it."""
    job = json.loads(job_file.read_text())
    sys.path[:] = job["path"]
    sys.meta_path.insert(0, Without())  # type: ignore[arg-type]
    results = {task["name"]: run(task, job_file.parent) for task in job["tasks"]}
    (job_file.parent / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
