"""Commands that torchrun has started on several ranks: rank 0 does what it always does, the others hold experts."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from moe_offload.cli.lazy_group import Failure
from moe_offload.errors import ConfigError, GroupMismatchError, MoeOffloadError, PeerFailedError, PeerLostError
from moe_offload.offload.parallel.environment import in_a_group, serves_experts

__all__ = [
    "group_if_any",
    "in_a_group",
    "refuse_ranks",
    "serve",
    "serve_group",
    "serves_experts",
    "started_by_torchrun",
]

if TYPE_CHECKING:
    from moe_offload.offload.parallel.group import ExpertGroup

# For rank 0 to say what is wrong: a launcher ends all ranks as soon as one has ended.
_LET_RANK_0_SPEAK_S = 2.0


@contextmanager
def group_if_any(device: str = "auto") -> Iterator["ExpertGroup | None"]:
    """On rank 0: the group that this process was started in; None where it was started alone."""
    if not in_a_group():
        yield None
        return
    from moe_offload.offload.parallel.group import ExpertGroup

    signal.signal(signal.SIGTERM, _end)
    with ExpertGroup.from_environment(device) as group:
        yield group


def refuse_ranks(what: str) -> None:
    """`ConfigError` where this process was started as one of several; ``what``: "a trace is"."""
    if in_a_group():
        raise ConfigError(f"{what} of one process that has all experts; start it without torchrun")


def started_by_torchrun() -> bool:
    """Whether there is a launcher that takes Ctrl-C for itself, and ends all ranks then."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def serve(model: str | None, load: Mapping[str, Any]) -> None:
    """On other ranks: hold the experts of ``model`` (None: the demo) until rank 0 has done with it."""

    def hold(group: "ExpertGroup") -> None:
        from moe_offload.offload.demo.build import demo_budget, ensure_demo
        from moe_offload.offload.parallel.loading import serve_experts

        if model is None:
            path = str(group.in_turn(ensure_demo, "demo"))
            serve_experts(path, group, **(demo_budget(load.get("device", "auto")) | dict(load)))
        else:
            serve_experts(model, group, **load)

    if "trace" in load:
        refuse_ranks("a trace is")
    serve_group(hold, load.get("device", "auto"))


def serve_group(hold: Callable[["ExpertGroup"], None], device: str = "auto") -> None:
    """Do ``hold(group)`` quietly: the terminal is rank 0's. It says what is wrong, unless that is known only here."""
    from moe_offload.cli.consoles import notes_console
    from moe_offload.cli.opening import quiet_libraries, silence_transformers

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides what Ctrl-C means
    with quiet_libraries(notes_console()):
        from moe_offload.offload.parallel.group import ExpertGroup

        silence_transformers()
        try:
            with ExpertGroup.from_environment(device) as group:
                hold(group)
        except (PeerFailedError, GroupMismatchError):
            time.sleep(_LET_RANK_0_SPEAK_S)
            raise click.exceptions.Exit(1) from None
        except MoeOffloadError as error:
            raise Failure(f"rank {os.environ['RANK']}: {error}") from error


def _end(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.is_finalizing():
        return
    raise PeerLostError("this rank was told to end, as torchrun does when another has ended: see what that one says")
