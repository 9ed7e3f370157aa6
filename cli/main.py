"""The command ``moe-offload``: what it offers, and how it fails.

Nothing heavy is imported here. A command's module is loaded when the command is run or its own help is asked for,
and torch only once the command is under way.
"""

import sys

import click

from moe_offload._version import VERSION
from moe_offload.cli.lazy_group import LazyCommand, LazyGroup

INTERRUPTED = 130  # 128 + SIGINT, as shells report it

COMMANDS = {
    "chat": LazyCommand("moe_offload.cli.chat:chat", "Talk with a model; with no MODEL, with the built-in demo."),
    "generate": LazyCommand("moe_offload.cli.generate:generate", "Answer or complete one prompt."),
    "pack": LazyCommand("moe_offload.cli.pack:pack", "Make an expert pack of a checkpoint, ready to run."),
    "plan": LazyCommand(
        "moe_offload.cli.plan:plan", "Say whether a model will run, and how fast, before anything is downloaded."
    ),
    "profile": LazyCommand(
        "moe_offload.cli.profile:profile", "Show where the bytes and the time of a run went, and what would help most."
    ),
    "bench": LazyCommand(
        "moe_offload.cli.bench:bench", "Measure decoding under a budget, beside what this machine allows."
    ),
    "replay": LazyCommand(
        "moe_offload.cli.replay:replay", "Tell from recorded routing what other caches would have done."
    ),
    "learn": LazyCommand(
        "moe_offload.cli.learn:learn", "Fit a predictor to a model from recorded routing, for --policy learned."
    ),
    "doctor": LazyCommand(
        "moe_offload.cli.doctor:doctor", "Look over this machine: memory, speeds, versions, kernels."
    ),
    "completion": LazyCommand("moe_offload.cli.completion:completion", "Print the script that completes commands."),
}


@click.group(cls=LazyGroup, commands_table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, message="moe-offload %(version)s")
def cli() -> None:
    """Run mixture-of-experts language models that do not fit in memory.

    Hot experts stay in memory as quantised weights, cold ones are streamed from disk when the router asks for them.
    A MODEL is a folder (a checkpoint or a pack) or the name of a model on the Hugging Face hub.

    \b
    Try:
      moe-offload chat                        talk with the built-in demo
      moe-offload chat MODEL --ram 12GiB      with a model of yours, in 12 GiB
    """


def main() -> None:
    """Run the command line and exit with its status."""
    sys.exit(run(sys.argv[1:]))


def run(args: list[str]) -> int:
    """Run the command line on ``args``; its exit status: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C."""
    try:
        status = cli.main(args, prog_name="moe-offload", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        click.secho("Interrupted.", dim=True, err=True)
        return INTERRUPTED
    return status if isinstance(status, int) else 0
