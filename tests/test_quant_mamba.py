"""The kernel of a Mamba 2 layer against plain torch, on every backend that can run here."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from moe_offload.quant import kernels
from moe_offload.quant.mamba_step import MambaCall, MambaWeights
from moe_offload.quant.step_weights import Norm, RawWeight

BACKENDS = [name for name in kernels.available() if name != "torch"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Of a result's largest number: what is rounded on the way is normalised, and fed back.
TOLERANCE = {torch.bfloat16: 6 * 2**-7, torch.float16: 6 * 2**-10, torch.float32: 6e-5}
HIDDEN, HEADS, HEAD_DIM, GROUPS, STATE_SIZE, KERNEL_SIZE = 72, 6, 20, 2, 37, 4
INNER, WIDTH = HEADS * HEAD_DIM, GROUPS * STATE_SIZE
CHANNELS = INNER + 2 * WIDTH

pytestmark = pytest.mark.skipif(not BACKENDS, reason="no kernels were built")


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Any:
    with kernels.forced(request.param):
        yield request.param


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, std: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std).to(dtype)


def linear(rows: int, cols: int, dtype: torch.dtype, seed: int) -> RawWeight:
    return RawWeight(random(rows, cols, dtype=dtype, seed=seed, std=1.5 * cols**-0.5))


def make_weights(dtype: torch.dtype) -> MambaWeights:
    return MambaWeights(
        input=linear(INNER + CHANNELS + HEADS, HIDDEN, dtype, 1),
        output=linear(HIDDEN, INNER, dtype, 2),
        norm=Norm(random(INNER, dtype=dtype, seed=3), 1e-6, True),
        convolution=random(CHANNELS, KERNEL_SIZE, dtype=dtype, seed=4, std=0.7),
        convolution_bias=random(CHANNELS, dtype=dtype, seed=5),
        step_bias=random(HEADS, dtype=dtype, seed=6),
        decay_log=random(HEADS, seed=7, std=0.5),
        skip=random(HEADS, dtype=dtype, seed=8),
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        num_groups=GROUPS,
        state_size=STATE_SIZE,
    )


class Case:
    """A token's inputs, and the states before it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.x = random(1, 1, HIDDEN, dtype=dtype, seed=10)
        self.past = random(1, CHANNELS, KERNEL_SIZE, dtype=dtype, seed=11)
        self.state = random(1, HEADS, HEAD_DIM, STATE_SIZE, seed=12)

    def run(self, weights: MambaWeights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the kernel gives, and the states after."""
        return MambaCall(weights, self.x.dtype)(self.x, self.past, self.state).view(-1), self.past, self.state

    def expected(self, weights: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same in float64."""
        made = F.linear(self.x.double().view(-1), weights.input.weight.double())
        gate, mixed, steps = made.split([INNER, CHANNELS, HEADS])
        past = torch.cat([self.past.double()[0, :, 1:], mixed[:, None]], 1)
        mixed = F.silu((past * weights.convolution.double()).sum(1) + weights.convolution_bias.double())
        x, reads, writes = mixed.split([INNER, WIDTH, WIDTH])
        x = x.view(HEADS, HEAD_DIM)
        reads, writes = (
            part.view(GROUPS, STATE_SIZE).repeat_interleave(HEADS // GROUPS, 0) for part in (reads, writes)
        )
        steps = F.softplus(steps + weights.step_bias.double())
        decay = (-weights.decay_log.double().exp() * steps).exp()
        state = self.state.double()[0] * decay[:, None, None] + (steps[:, None] * x)[..., None] * reads[:, None]
        out = (state @ writes[..., None]).squeeze(-1) + x * weights.skip.double()[:, None]
        out = (out.view(-1) * F.silu(gate)).view(GROUPS, -1)
        out = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + weights.norm.epsilon)
        out = out.view(-1) * weights.norm.weight.double()
        return F.linear(out, weights.output.weight.double()), past[None], state[None]


@pytest.mark.parametrize("dtype", DTYPES)
def test_mamba(dtype):
    case, weights = Case(dtype), make_weights(dtype)
    expected = case.expected(weights)
    for found, wanted in zip(case.run(weights), expected, strict=True):
        assert found.shape == wanted.shape
        assert float((found.double() - wanted).abs().max()) <= TOLERANCE[dtype] * float(wanted.abs().max())


def test_the_same_bits_for_any_number_of_threads():
    weights = make_weights(torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(Case(torch.bfloat16).run(weights))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
