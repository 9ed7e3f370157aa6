"""A process that packs from a hub: commands as JSON lines on stdin, answers as JSON lines on stdout.

huggingface_hub reads its endpoint when it is imported, so it takes a process whose environment names the test's hub.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import constants, file_download, hf_hub_download

from moe_offload.errors import MoeOffloadError
from moe_offload.offload.checkpoint.hub_headers import hub_headers
from moe_offload.offload.forecast.model_shape import open_shape
from moe_offload.offload.pack.packer import pack_model

torch.set_num_threads(1)
constants.DOWNLOAD_CHUNK_SIZE = 1024
ENDPOINT = constants.ENDPOINT
file_download.time = SimpleNamespace(sleep=lambda seconds: None)


class Progress:
    """Adds up what it is told."""

    def __init__(self) -> None:
        self.total_bytes = self.done_bytes = 0
        self.label = ""

    def start(self, label: str, total_bytes: int | None) -> None:
        self.label, self.total_bytes = label, total_bytes or 0

    def advance(self, num_bytes: int) -> None:
        self.done_bytes += num_bytes

    def finish(self) -> None:
        pass


def headers(model: str, revision: str | None, token: str | None) -> dict[str, Any]:
    """What is known of a model by its config and headers, and the forecast's sizes."""
    try:
        found = hub_headers(model, revision=revision, token=token)
        shape = open_shape(model, revision=revision, token=token)
    except MoeOffloadError as error:
        return {"error": type(error).__name__, "text": str(error)}
    outline = shape.outline("nf4", "source")
    return {
        "revision": found.revision,
        "fetched_bytes": found.fetched_bytes,
        "tensor_bytes": found.tensor_bytes,
        "source_weights": shape.source_weights,
        "slot_bytes": [layer.slot_bytes for layer in outline.layers],
        "dense_bytes": outline.dense_bytes,
    }


def run(command: dict[str, Any]) -> dict[str, Any]:
    """Pack; or, for ``cache``, put a file into the hub cache; or, for ``headers``, read those."""
    os.environ["MOE_OFFLOAD_HOME"] = command.get("home", "")
    constants.HF_HUB_OFFLINE = command.get("offline", False)
    constants.ENDPOINT = command.get("endpoint", ENDPOINT)
    if "cache" in command:
        return {"path": hf_hub_download(command["model"], command["cache"])}
    if command.get("headers"):
        return headers(command["model"], command.get("revision"), command.get("token"))
    disk_usage = shutil.disk_usage
    if "free_bytes" in command:
        shutil.disk_usage = lambda path: SimpleNamespace(free=command["free_bytes"])
    progress = Progress()
    arguments = {key: command[key] for key in ("revision", "token", "format") if key in command}
    try:
        path = pack_model(
            command["model"], Path(command["output"]) if "output" in command else None, progress=progress, **arguments
        )
        return {"path": str(path), "progress": vars(progress)}
    except MoeOffloadError as error:
        return {"error": type(error).__name__, "text": str(error)}
    finally:
        shutil.disk_usage = disk_usage


for line in sys.stdin:
    print(json.dumps(run(json.loads(line))), flush=True)
