"""The sections of a profile, as objects: what each figure is and its unit stand in docs/profile-report.md.

Shapes: L layers with experts, E_l experts of layer l, P points of a series. Times are in seconds, sizes in bytes,
ratios from 0 to 1. None (null in JSON): the trace did not tell, or there was nothing to divide by.
"""

from dataclasses import dataclass
from typing import Literal

Floats = tuple[float, ...]
Integers = tuple[int, ...]
OptionalFloats = tuple[float | None, ...]
LeverKind = Literal["more_slots", "fewer_bits", "policy", "prefetch", "faster_disk"]
Bottleneck = Literal["disk", "memory", "pcie"]


@dataclass(frozen=True)
class Exactness:
    """What the answers equal, in words; ``lossless``: bit for bit the checkpoint's own numbers."""

    lossless: bool | None
    text: str


@dataclass(frozen=True)
class BoundFigures:
    """The most tokens a second that the rates allow, what sets it, and the share of it that was reached."""

    tokens_per_s: float
    by: Bottleneck
    share: float


@dataclass(frozen=True)
class Header:
    """The figures to see first, of decoding unless the name says otherwise."""

    tokens_per_s: float | None
    median_step_s: float | None
    time_to_first_token_s: float | None
    hit_ratio_decode: float | None
    hit_ratio_prefill: float | None
    disk_bytes_per_token: float | None
    pcie_bytes_per_token: float | None
    stall_share: float | None
    exactness: Exactness
    bound: BoundFigures | None


@dataclass(frozen=True)
class Lever:
    """One change, and the decode speed that it is predicted to bring (``gain``: 0.25 is a quarter faster)."""

    kind: LeverKind
    change: str
    tokens_per_s: float
    gain: float
    hit_ratio: float | None
    disk_bytes_per_token: float
    option: str | None
    sentence: str
    formula: str


@dataclass(frozen=True)
class Levers:
    """Best first. ``next``: the sentence of the best that leaves the answers as they are, or that none is worth it."""

    model: str
    modelled_tokens_per_s: float
    levers: tuple[Lever, ...]
    next: str


@dataclass(frozen=True)
class Residency:
    """Where experts were, reconstructed from outcomes: F frames, L texts each, one digit per expert.

    Digit d: in a slot for d/9 of the frame's decode tokens, rounded.
    """

    first_token: Integers
    frames: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Usage:
    """Heat maps [L][E_l]: uses are tokens, requests and hits are experts asked for by decode steps."""

    prefill_uses: tuple[Integers, ...]
    decode_uses: tuple[Integers, ...]
    requests: tuple[Integers, ...]
    hits: tuple[Integers, ...] | None
    residency: Residency | None


@dataclass(frozen=True)
class LayerFigures:
    """One layer; times and shares are of decoding. ``starving``: it misses far more than its share."""

    layer: int
    experts: int
    slots: int | None
    requests: int
    hits: int | None
    late: int | None
    misses: int | None
    hit_ratio: float | None
    hit_ratio_prefill: float | None
    miss_share: float | None
    dense_s: float | None
    router_s: float | None
    wait_s: float | None
    experts_s: float | None
    starving: bool


@dataclass(frozen=True)
class StepSeries:
    """The run step by step [P]; where there are many, ``steps_per_point`` neighbours of one kind are added up.

    ``late`` are the hits that were waited for. The five times add up to ``wall_s``. ``copied_*`` were sent to GPUs,
    ``link_busy_s`` is the time that it took links, those of several GPUs added up.
    """

    steps_per_point: int
    first_step: Integers
    num_steps: Integers
    num_tokens: Integers
    sequence: Integers
    phase: tuple[Literal["prefill", "decode"], ...]
    requests: Integers
    hits: Integers | None
    late: Integers | None
    misses: Integers | None
    wall_s: Floats | None
    dense_s: Floats | None
    router_s: Floats | None
    wait_s: Floats | None
    experts_s: Floats | None
    other_s: Floats | None
    copied_demand_bytes: Integers | None
    copied_ahead_bytes: Integers | None
    link_busy_s: Floats | None


@dataclass(frozen=True)
class TimeSplit:
    """Where the wall clock of one phase went; ``other``: head, sampling, Python, what is between the layers.

    ``clock_s`` is from the first step's begin to the last one's end, less what lies between sequences;
    ``accounted_share`` is the sum of the parts over it.
    """

    steps: int
    tokens: int
    clock_s: float
    dense_s: float
    router_s: float
    wait_s: float
    experts_s: float
    other_s: float
    accounted_share: float


@dataclass(frozen=True)
class Timing:
    """The split of both phases, and the percentiles of a decode step's time."""

    decode: TimeSplit | None
    prefill: TimeSplit | None
    step_p10_s: float | None
    step_p50_s: float | None
    step_p90_s: float | None
    step_p99_s: float | None


@dataclass(frozen=True)
class LinkPhase:
    """What all links carried in the steps of one phase.

    ``busy_share``: of the steps' time, the part in which a link was copying, in the mean of the links. ``use``: bytes
    over what links at their peak would have carried in that time.
    """

    demand_bytes: int
    ahead_bytes: int
    busy_s: float
    busy_share: float | None
    use: float | None


@dataclass(frozen=True)
class GpuLink:
    """One GPU's link over the whole run; the peak is the fastest copy, in the run or when rates were measured."""

    gpu: int
    demand_bytes: int
    ahead_bytes: int
    busy_s: float
    peak_bytes_per_s: float | None


@dataclass(frozen=True)
class Link:
    """Copies to GPUs: those that a step waited for (demand), and those that nobody waited for yet (ahead).

    ``peak_bytes_per_s`` of all links together; ``step_use_*``: percentiles of `LinkPhase.use` of single decode steps.
    """

    peak_bytes_per_s: float | None
    gpus: tuple[GpuLink, ...]
    decode: LinkPhase | None
    prefill: LinkPhase | None
    step_use_p10: float | None
    step_use_p50: float | None
    step_use_p90: float | None


@dataclass(frozen=True)
class PolicyCurve:
    """Hit ratio in decode against slots, without prefetching; ``is_bound``: nothing can be better (Belady)."""

    policy: str
    label: str
    is_bound: bool
    slots: Integers
    resident_share: Floats
    resident_bytes: tuple[int, ...] | None
    hit_ratio: Floats


@dataclass(frozen=True)
class CurvePoint:
    """A place on the curves: slots of all layers together."""

    slots: int
    resident_share: float
    resident_bytes: int | None
    hit_ratio: float


@dataclass(frozen=True)
class Curves:
    """Hit ratio against cache size: ``today`` is the run's budget on the run's policy, ``measured`` what was counted.

    ``measured_hit_ratio`` has what prefetching brought, ``measured_resident_ratio`` has not. ``knee``: where more
    slots begin to bring less, on the curve of ``knee_policy``.
    """

    curves: tuple[PolicyCurve, ...]
    today: CurvePoint | None
    measured_hit_ratio: float | None
    measured_resident_ratio: float | None
    knee: CurvePoint | None
    knee_policy: str | None


@dataclass(frozen=True)
class Prediction:
    """How well the next experts were foreseen, in decode: [L][D] by layer and distance, [D] of all layers.

    Recall: share of the experts asked for that were predicted; precision: share of those predicted that were asked
    for. Bytes and experts are of speculative transfers. ``hidden_s``: transfer time that no step waited for.
    """

    distances: Integers
    predicted_per_layer: int
    recall: OptionalFloats
    precision: OptionalFloats
    layer_recall: tuple[OptionalFloats, ...]
    layer_precision: tuple[OptionalFloats, ...]
    used_experts: int | None
    late_experts: int | None
    wasted_experts: int | None
    used_bytes: int | None
    late_bytes: int | None
    wasted_bytes: int | None
    demand_bytes: int | None
    hidden_s: float | None
    waited_s: float | None


@dataclass(frozen=True)
class Repetition:
    """How often the next token of a sequence chooses the same experts in a layer; in decode.

    ``first``: the same first choice; ``any``: one of the chosen in common; ``share``: share of the chosen that repeat.
    ``random_*``: what choosing at random would give.
    """

    first: OptionalFloats
    any: OptionalFloats
    share: OptionalFloats
    random_first: Floats
    random_any: Floats
    random_share: Floats


@dataclass(frozen=True)
class PublishedRepetition:
    """Repetition as published, the range over the kinds of text; layers are of that model."""

    model: str
    source: str
    layer: int
    first_low: float
    first_high: float
    any_low: float
    any_high: float


@dataclass(frozen=True)
class ExpertLoad:
    """The load of one layer's experts, in decode (in prefill where nothing was decoded).

    ``entropy_bits`` of the shares of use, at most ``max_entropy_bits``; ``largest_share`` of the busiest expert;
    ``unused``: never chosen; ``gini``: 0 is even, near 1 all on one.
    """

    layer: int
    entropy_bits: float
    max_entropy_bits: float
    largest_share: float
    busiest_expert: int
    unused: int
    gini: float


@dataclass(frozen=True)
class CoactivationPair:
    """Expert ``expert`` of a layer followed by ``next_expert`` of the next in so many tokens, ``lift`` times chance."""

    layer: int
    expert: int
    next_expert: int
    tokens: int
    lift: float


@dataclass(frozen=True)
class CoactivationMap:
    """``probability[i][j]``: that ``next_experts[j]`` is chosen in ``next_layer`` when ``experts[i]`` was in ``layer``.

    The busiest experts of both layers, in the order of their numbers.
    """

    layer: int
    next_layer: int
    experts: Integers
    next_experts: Integers
    probability: tuple[Floats, ...]


@dataclass(frozen=True)
class Coactivation:
    """What one layer's experts tell of the next one's: [L-1], from layer l to l+1.

    ``recall``: share of the next layer's experts among the top-k that a table of frequencies names, learnt on the first
    half of the tokens and scored on the second; ``base_recall``: the same from the next layer's own load alone.
    """

    recall: OptionalFloats
    base_recall: OptionalFloats
    strongest: tuple[CoactivationPair, ...]
    maps: tuple[CoactivationMap, ...]


@dataclass(frozen=True)
class ExpertStatistics:
    """What the routing is like."""

    load: tuple[ExpertLoad, ...]
    repetition: Repetition | None
    published: tuple[PublishedRepetition, ...]
    coactivation: Coactivation | None


@dataclass(frozen=True)
class Missing:
    """A section or figure that the trace could not give, and why."""

    section: str
    reason: str
