"""The tier that a plan asks for, with the reader below it."""

from pathlib import Path

import torch

from moe_offload.offload.compute_tier import ComputeTier
from moe_offload.offload.cpu_tier import CpuTier
from moe_offload.offload.cuda_queue import CudaQueue
from moe_offload.offload.cuda_tier import CudaTier
from moe_offload.offload.pack_manifest import PackManifest
from moe_offload.offload.plan import Plan
from moe_offload.offload.reader import ExpertReader, Verify


def make_tier(manifest: PackManifest, folder: Path, plan: Plan, device: torch.device, verify: Verify) -> ComputeTier:
    """Reserve the memory of ``plan``; BudgetError where the system or the device refuses it."""
    reader = ExpertReader(manifest, folder, verify=verify)
    try:
        if plan.device == "cpu":
            return CpuTier(manifest, reader, num_slots=plan.num_slots, num_staging_slots=plan.staging_slots)
        return CudaTier(
            manifest,
            reader,
            CudaQueue(device),
            num_slots=plan.num_slots,
            num_staging_slots=plan.staging_slots,
            num_host_slots=plan.num_host_slots,
            num_host_staging_slots=plan.num_host_staging_slots,
        )
    except BaseException:
        reader.close()
        raise
