"""The tier that a plan asks for, with the reader below it."""

from pathlib import Path

import torch

from moe_offload.offload.pack.manifest import PackManifest
from moe_offload.offload.planning.plan import Plan
from moe_offload.offload.streaming.reader import ExpertReader, Verify
from moe_offload.offload.tiers.compute_tier import ComputeTier
from moe_offload.offload.tiers.cpu_tier import CpuTier
from moe_offload.offload.tiers.cuda_queue import CudaQueue
from moe_offload.offload.tiers.cuda_tier import CudaTier


def make_tier(manifest: PackManifest, folder: Path, plan: Plan, device: torch.device, verify: Verify) -> ComputeTier:
    """Reserve the memory of ``plan``; BudgetError where the system or the device refuses it."""
    reader = ExpertReader(manifest, folder, verify=verify)
    try:
        if plan.device == "cpu":
            return CpuTier(manifest, reader, num_slots=plan.num_slots, num_staging_slots=plan.staging_slots)
        devices = [torch.device("cuda", part.index) for part in plan.parts] or [device]
        return CudaTier(
            manifest,
            reader,
            [CudaQueue(each) for each in devices],
            device_of_layer=plan.device_of_layer,
            num_slots=plan.num_slots,
            num_staging_slots=plan.staging_slots,
            num_host_slots=plan.num_host_slots,
            num_host_staging_slots=plan.num_host_staging_slots,
        )
    except BaseException:
        reader.close()
        raise
