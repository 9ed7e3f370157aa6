"""The files of weights of all engines, written when they are first needed and kept in one folder."""

import shutil
from pathlib import Path

from peer_runs.cases import Case, Entry
from peer_runs.shapes import Shape


class WeightFiles:
    """Finds or writes what an entry runs on; says what it writes."""

    def __init__(self, folder: Path) -> None:
        """``folder`` has to exist."""
        self._folder = folder

    def path(self, entry: Entry, case: Case) -> Path:
        """A GGUF file, or the folder of a pack."""
        family = case.shape.family
        if entry.engine == "moe-offload":
            folder = self._folder / f"{family}-{entry.weights}"
            if not (folder / "pack.json").exists():
                _write_pack(folder, case.shape, entry.weights)
            return folder
        path = self._folder / f"{family}-{entry.weights}.gguf"
        if not path.exists():
            from peer_runs.gguf_file import matrix_bytes, write_gguf

            _announce(path, matrix_bytes(case.shape, entry.weights))
            write_gguf(path, case.shape, entry.weights)
        return path


def weight_bytes(path: Path) -> int:
    """Size of a file, or of all files of a folder."""
    return sum(item.stat().st_size for item in path.iterdir()) if path.is_dir() else path.stat().st_size


def _announce(path: Path, num_bytes: float) -> None:
    free_bytes = shutil.disk_usage(path.parent).free
    print(f"writing {path}, {num_bytes / 1e9:.1f} GB of {free_bytes / 1e9:.0f} GB free", flush=True)
    if num_bytes > 0.95 * free_bytes:
        raise SystemExit(f"{path} does not fit; name a folder on a larger disk with --work")


def _write_pack(folder: Path, shape: Shape, spec: str) -> None:
    from transformers import AutoConfig

    from moe_offload.offload.pack.synthetic import write_synthetic_pack
    from moe_offload.quant import get_format

    _announce(folder, shape.num_weights * get_format(spec).bits_per_weight() / 8)
    config = AutoConfig.for_model(**shape.transformers_config())
    # As in a GGUF file: one format for all matrices.
    write_synthetic_pack(folder, config, format=spec, dense_format=spec)
