"""Writes the table of families in docs/models.md: all that are tested, run once more. Takes a minute or two."""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from families import ENCODER_DECODERS, FAMILIES, MORE_FAMILIES  # noqa: E402
from family_runs import FamilyRun, run_family  # noqa: E402

HEAD = """\
# Models

These families run. Each line is a test (`tests/test_families.py`): a tiny model with random weights is saved, packed
with `--format source` and loaded in fp32 with one slot in each layer, the smallest budget. Its logits, of a prompt and
of 8 decode steps for two sequences, are compared with those of transformers on the same checkpoint; the greedy tokens
are the same in every line.

- *difference*: the largest difference of any logit, relative to the largest logit. 0 is bit-identical. Others add up in
  another order than transformers does, a token's experts or a product's terms (one torch thread; more add up otherwise
  again); nothing here depends on the budget.
- *reached by*: `interface` is transformers' experts interface, `own` a forward of this project's that does what the
  family's does.
- *lookahead*: the share of layers with experts whose router can be asked ahead of time, so that `--prefetch` works for
  them.

A family is missing? If transformers decorates its experts class, it most likely runs: try it. A class that is not known
is refused by name, and so is a model without experts.

| family | experts class | reached by | difference | lookahead |
| --- | --- | --- | --- | --- |
"""
NOTES = """
Encoder-decoders: {encoder_decoders}. NLLB-MoE is compared with the algorithm of transformers 4 (GShard's top-2), which
this project follows: in transformers 5, up to 5.23 at least, only the experts 0 and 1 of a layer ever run.
`llama4`, `qwen3_vl_moe` and `step3p7` are models with images; text goes through the whole of them, images are not
tested.

This part is written by `python benchmarks/families_table.py`.
"""
FORECASTS = "## Well-known models, foretold\n"  # what follows is benchmarks/models_table.py's


def row(run: FamilyRun) -> str:
    """One family's line."""
    difference = f"{run.relative_difference:.0e}" if run.difference else "0"
    way = "interface" if run.is_decorated else "own"
    lookahead = f"{run.num_lookahead_layers} of {run.num_expert_layers}"
    return f"| `{run.name}` | `{run.experts_class}` | {way} | {difference} | {lookahead} |"


def main() -> None:
    """Run all families and write the page."""
    rows = []
    for name in [*FAMILIES, *MORE_FAMILIES]:
        with tempfile.TemporaryDirectory() as folder:
            run = run_family(name, Path(folder))
        if not run.same_tokens:
            sys.exit(f"{name}: the tokens differ from those of transformers")
        rows.append(row(run))
        print(rows[-1])
    notes = NOTES.format(encoder_decoders=", ".join(f"`{name}`" for name in sorted(ENCODER_DECODERS)))
    page = ROOT / "docs" / "models.md"
    _, heading, rest = page.read_text().partition(FORECASTS)
    page.write_text(HEAD + "\n".join(rows) + "\n" + notes + "\n" + heading + rest)


if __name__ == "__main__":
    main()
