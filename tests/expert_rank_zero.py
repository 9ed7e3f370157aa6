"""A program for tests: rank 0 of a group. It loads a model, and answers each further line of its input."""

import json
import sys

import torch

from moe_offload import OffloadedModel
from moe_offload.errors import MoeOffloadError
from moe_offload.offload.parallel.group import ExpertGroup


def main() -> None:
    torch.set_num_threads(1)
    try:
        with ExpertGroup.from_environment("cpu") as group:
            model, settings = json.loads(sys.stdin.readline())
            with OffloadedModel.from_pretrained(model, group=group, **settings) as loaded:
                for line in sys.stdin:
                    print(loaded.generate(line.strip(), max_new_tokens=6, temperature=0), flush=True)
    except MoeOffloadError as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
