"""Ranks of a group for tests: rank 0 is the test's own process, the others are children that serve what they are told.

As a program it is such a child: each line of its input is a model to serve, with arguments as JSON.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

SETTINGS: dict[str, Any] = {"device": "cpu", "ram": "1GiB", "context_tokens": 64, "warm_start": False}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(
    rank: int, num_ranks: int, port: int, host: str = "127.0.0.1", local: bool = True
) -> dict[str, str]:
    """As torchrun sets it: all ranks on one machine, or each on one of its own."""
    place = {"RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_ADDR": host, "MASTER_PORT": port}
    place |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": num_ranks} if local else {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    return {name: str(value) for name, value in place.items()} | {"OMP_NUM_THREADS": "1"}


class Child:
    """A rank above 0."""

    def __init__(self, environment: dict[str, str], *prefix: str, program: str = "expert_ranks.py") -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(Path(__file__).with_name(program))],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def serve(self, model: Path, **settings: Any) -> None:
        self.write_line(json.dumps([str(model), SETTINGS | settings]))

    def end(self, timeout_s: float = 30.0) -> tuple[int, str]:
        """Its exit status, and what it said last."""
        self.input.close()
        assert self.process.stderr is not None
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"it did not end: {self.process.stderr.read()[-2000:]}") from None
        return self.process.returncode, self.process.stderr.read().strip().rpartition("\n")[2]

    def write_line(self, text: str) -> None:
        self.input.write(text + "\n")
        self.input.flush()

    def read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Killed at the end if it has not ended by then."""
        try:
            yield
        finally:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
                assert pipe is not None
                pipe.close()

    @property
    def input(self) -> IO[str]:
        assert self.process.stdin is not None
        return self.process.stdin


@contextmanager
def children(num_ranks: int, port: int) -> Iterator[list[Child]]:
    """All ranks but 0; killed at the end if they have not ended by then."""
    with ExitStack() as stack:
        ranks = [Child(rank_environment(rank, num_ranks, port)) for rank in range(1, num_ranks)]
        for rank in ranks:
            stack.enter_context(rank.watched())
        yield ranks


def main() -> None:
    import torch

    from moe_offload.errors import MoeOffloadError
    from moe_offload.offload.parallel import loading
    from moe_offload.offload.parallel.group import ExpertGroup
    from moe_offload.offload.planning.plan import make_plan

    torch.set_num_threads(1)
    try:
        with ExpertGroup.from_environment("cpu") as group:
            for line in sys.stdin:
                model, settings = json.loads(line)
                num_slots = settings.pop("num_slots", None)

                def plan_with_slots(*args: Any, num_slots: int | None = num_slots, **options: Any) -> Any:
                    plan = make_plan(*args, **options)
                    return plan if num_slots is None else replace(plan, num_slots=(num_slots,) * len(plan.num_slots))

                loading.make_plan = plan_with_slots
                loading.serve_experts(model, group, **settings)
    except MoeOffloadError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
