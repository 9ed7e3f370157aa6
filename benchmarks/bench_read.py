"""How fast experts come from the disk through the reader, beside plain O_DIRECT reads of the same file.

Each line: experts of one size, all read once in order, eight in flight (as the misses of a layer are). The plain rates
are of 4 MiB pieces: by one thread into ordinary memory, as dd does it, into huge pages, which a slab has too and which
give the disk larger requests, and by as many threads as the reader has.
"""

import argparse
import itertools
import mmap
import os
import tempfile
import threading
import time
from pathlib import Path

from moe_offload.offload.pack.manifest import LayerLayout, PackManifest
from moe_offload.offload.pack.writer import PackWriter
from moe_offload.offload.streaming.disk import DirectDisk
from moe_offload.offload.streaming.reader import ExpertReader, Read, Verify
from moe_offload.offload.streaming.slab import Slab

MIB = 1 << 20
PIECE_BYTES = 4 * MIB


def write_pack(folder: Path, slot_bytes: int, num_experts: int) -> tuple[PackManifest, float]:
    """A pack of one layer of noise, and the rate at which it was written, in MiB/s."""
    data = os.urandom(slot_bytes)
    layout = LayerLayout.of("layer", num_experts, [("weight", (slot_bytes,), "int8", slot_bytes)])
    with PackWriter(folder, identity={"source": "noise"}) as writer:
        start_s = time.perf_counter()
        with writer.layer(0, layout) as layer:
            for expert_idx in range(num_experts):
                layer.write_expert(expert_idx, data)
        took_s = time.perf_counter() - start_s
        manifest = writer.finish(source="noise", revision=None, expert_format="int8", dense_format="source")
    return manifest, manifest.expert_bytes / MIB / took_s


def plain_rate(path: Path, num_threads: int, huge_pages: bool) -> float:
    """MiB/s of O_DIRECT preads, each thread on the next piece of the file."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    pieces = itertools.count()
    total_bytes = os.fstat(fd).st_size

    def read() -> None:
        buffer = mmap.mmap(-1, PIECE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if huge_pages:
            buffer.madvise(mmap.MADV_HUGEPAGE)
        while (offset_bytes := next(pieces) * PIECE_BYTES) < total_bytes:
            os.preadv(fd, [buffer], offset_bytes)

    threads = [threading.Thread(target=read) for _ in range(num_threads)]
    start_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)
    return total_bytes / MIB / (time.perf_counter() - start_s)


def reader_rate(manifest: PackManifest, folder: Path, num_threads: int, verify: Verify) -> tuple[float, bool]:
    """MiB/s of every expert read once into slots, and whether all reads were direct."""
    (layer,) = manifest.layers
    in_flight = min(8, layer.num_experts)
    disk = DirectDisk()
    with (
        Slab(in_flight, layer.slot_bytes) as slab,
        ExpertReader(manifest, folder, disk=disk, num_threads=num_threads, verify=verify) as reader,
    ):
        for slot in range(in_flight):
            slab.tensor(slot).fill_(0)  # as in use: page faults are paid once in a run
        reads: list[Read] = []
        start_s = time.perf_counter()
        for expert_idx in range(layer.num_experts):
            slot = expert_idx % in_flight
            if expert_idx >= in_flight:
                reads[expert_idx - in_flight].wait()
            reads.append(reader.submit(0, expert_idx, slab.memory(slot)))
        for read in reads:
            read.wait()
        took_s = time.perf_counter() - start_s
    return manifest.expert_bytes / MIB / took_s, disk.buffered_files == 0


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="measure the disk that holds this folder (default: the temporary folder)")
    parser.add_argument("--total-mib", type=int, default=1536, help="size of each test pack")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--expert-mib", type=int, nargs="+", default=[4, 16, 94])
    parser.add_argument("--repeats", type=int, default=3, help="the median is shown")
    options = parser.parse_args()
    columns = ("expert", "written", "plain x1", "huge x1", f"huge x{options.threads}", "verified", "verify off")
    print("".join(f"{column:>11}" for column in columns))
    for expert_mib in options.expert_mib:
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            folder = Path(temporary) / "pack"
            manifest, written = write_pack(folder, expert_mib * MIB, max(1, options.total_mib // expert_mib))
            path = folder / manifest.layers[0].file
            rates: list[tuple[float, ...]] = []
            for _ in range(options.repeats):
                first, direct = reader_rate(manifest, folder, options.threads, "first")
                off, _ = reader_rate(manifest, folder, options.threads, "off")
                plain = (plain_rate(path, 1, False), plain_rate(path, 1, True), plain_rate(path, options.threads, True))
                rates.append((*plain, first, off))
            medians = [sorted(column)[len(column) // 2] for column in zip(*rates, strict=True)]
        note = "" if direct else "  (O_DIRECT refused: through the page cache)"
        print(f"{expert_mib:>7} MiB" + "".join(f"{rate:>11.0f}" for rate in (written, *medians)) + f"  MiB/s{note}")


if __name__ == "__main__":
    main()
