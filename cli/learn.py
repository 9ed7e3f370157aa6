"""``moe-offload learn``: fits a predictor of routing to a model, from traces of it."""

from pathlib import Path
from typing import Any

import click

from moe_offload.cli.options import MODEL, format_options


@click.command()
@click.argument("model", type=MODEL)
@click.argument("traces", nargs=-1, required=True, type=click.Path(dir_okay=False, path_type=Path), metavar="TRACE...")
@format_options
def learn(model: str, traces: tuple[Path, ...], **formats: Any) -> None:
    """Fit a predictor to a model from recorded routing, for --policy learned.

    MODEL is as for chat and generate; each TRACE an .npz file that --trace has recorded with it. The predictor is a
    small file beside the pack. A few thousand tokens of the texts that the model is used for make a difference; the
    last ones are kept apart, to tell how large.

    \b
    moe-offload generate MODEL --trace run.npz < prompt.txt
    moe-offload learn MODEL run.npz
    moe-offload chat MODEL --policy learned
    """
    from moe_offload.cache import read_trace
    from moe_offload.cli.consoles import notes_console
    from moe_offload.cli.opening import quiet_libraries, silence_transformers
    from moe_offload.cli.progress import TerminalProgress

    console = notes_console()
    with quiet_libraries(console):
        with console.status("Starting"):
            from moe_offload.offload.learning.learn import learn as fit
            from moe_offload.offload.learning.predictor_file import save_predictor
            from moe_offload.offload.pack.manifest import is_pack, read_manifest
            from moe_offload.offload.pack.packer import pack_model

            silence_transformers()
        folder, progress = Path(model).expanduser(), TerminalProgress(console)
        if not is_pack(folder):
            try:
                folder = pack_model(model, progress=progress, **formats)
            finally:
                progress.abandon()
        manifest = read_manifest(folder)
        read = [read_trace(path) for path in traces]
        with console.status("Replaying the traces") as status:
            lesson = fit(
                read,
                [layer.num_experts for layer in manifest.layers],
                lambda epoch, loss: status.update(f"Fitting: epoch {epoch}, loss {loss:.4f}"),
            )
        path = save_predictor(folder, manifest, lesson.weights)
    click.echo(path)
    console.print(f"fitted to {lesson.num_tokens:,} tokens; on {lesson.num_apart:,} others, hits in percent:")
    for gain in lesson.gains:
        closed = gain.gap_closed("learned")
        console.print(
            f"  {gain.share:4.0%} resident: LRU {gain.lru:.1%}, recall {gain.recall:.1%}, learned {gain.learned:.1%}, "
            f"at best {gain.belady:.1%}" + ("" if closed is None else f" ({closed:.0%} of the way)")
        )
    if any(gain.learned < gain.recall for gain in lesson.gains):
        console.print("It is no better than the default here; more tokens may help.")
