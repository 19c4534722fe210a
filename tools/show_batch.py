#!/usr/bin/env python3
"""Draw a row of the flat batch: who sees whom, and what each segment runs and reads.

The row is the one that training would get in its first epoch, drawn by the recipe's own collator; of the target only the
tokenizer and config.json are read. Needs matplotlib (the extra `report`).
"""

import argparse
import sys
from pathlib import Path

EPILOG = """examples:
  python tools/show_batch.py --example --out batch.png
  python tools/show_batch.py recipes/mine.yaml --row 3 --out batch.png
  python tools/show_batch.py recipes/mine.yaml data.max_length=48 cod.num_segments=3   # small enough for labels
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", help="a YAML file; left out with --example")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    parser.add_argument("--example", action="store_true", help="two short documents of words, K = 4, S = 3")
    parser.add_argument("--row", type=int, default=0, metavar="N", help="which packed row, from 0 (default 0)")
    parser.add_argument("--out", default="batch.png", metavar="FILE.png", help="default batch.png")
    options = parser.parse_intermixed_args(arguments)
    if bool(options.recipe) == options.example:
        parser.error("give a recipe or --example, and not both")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package beside it, installed or not
    from peagle_train.errors import run_tool

    return run_tool("show_batch", lambda: print(run(options)))


def run(options: argparse.Namespace) -> str:
    # Heavy imports happen here, so that --help answers at once.
    from peagle_train.core.collator import CODCollator
    from peagle_train.pictures.batch import draw_batch, example_row
    from peagle_train.pictures.style import load_matplotlib, png_of, write_bytes

    load_matplotlib()  # that it is lacking is told before anything is read
    if options.example:
        row, words = example_row()
        collator = CODCollator(len(words), num_depths=4, down_sample_ratio=0.8, num_segments=3, seed=1)
        title = f"One packed row: 2 documents, {len(words)} tokens, K = 4, S = 3"
    else:
        row, words, collator, title = _from_recipe(options)
    figure = draw_batch(collator([row]), collator.num_depths, words, list(row["loss_mask"]), title)
    write_bytes(Path(options.out), png_of(figure, dpi=100))
    return f"{options.out}: {title}"


def _from_recipe(options: argparse.Namespace) -> tuple:
    from transformers import AutoConfig

    from peagle_train.data.training_data import load_training_data
    from peagle_train.recipe import load_recipe
    from peagle_train.training.build import choose_mask_token, load_tokenizer, make_collator

    recipe = load_recipe(options.recipe, options.overrides)
    if recipe.cod.num_segments == "auto":
        raise ValueError("cod.num_segments is auto: give the number to draw, as in cod.num_segments=4")
    tokenizer = load_tokenizer(recipe)
    try:
        config = AutoConfig.from_pretrained(
            recipe.target.path, trust_remote_code=recipe.target.trust_remote_code, local_files_only=True
        ).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"target.path {recipe.target.path} has no config that can be read: {error}") from None
    mask_token_id = choose_mask_token(recipe.draft, tokenizer, config.vocab_size)
    rows = load_training_data(recipe, tokenizer, config.vocab_size, mask_token_id).train_rows
    if not 0 <= options.row < len(rows):
        raise ValueError(f"--row is {options.row}; there are rows 0..{len(rows) - 1}")
    row = rows[0, options.row]
    ids = row["input_ids"].tolist()
    words = [repr(tokenizer.decode([i]))[1:-1] for i in ids] if tokenizer else [str(i) for i in ids]
    cod = recipe.cod
    documents = int(row["document_ids"][-1]) + 1
    title = f"Row {options.row}: {documents} documents, {len(ids)} tokens, K = {cod.num_depths}, S = {cod.num_segments}"
    return row, words, make_collator(recipe, recipe.train.seed), title


if __name__ == "__main__":
    sys.exit(main())
