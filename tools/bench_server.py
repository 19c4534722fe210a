"""Tokens a second of the target in vLLM and in this process, side by side: the same sequences, in turns, other ones in each
(vLLM would find those of before in its cache).

peagle-train serve-target RECIPE --run &
python tools/bench_server.py RECIPE --server http://localhost:8000
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package beside it, installed or not

import torch

from peagle_train.config import load_recipe
from peagle_train.data.training_data import encoder_of, load_training_data, make_collator
from peagle_train.files import aligned
from peagle_train.target_model.frozen import FrozenTarget, TargetBase
from peagle_train.target_model.server import ServedTarget


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--server", required=True, metavar="URL")
    parser.add_argument("--batches", type=int, default=4, help="micro-batches of each turn (default 4)")
    parser.add_argument("--turns", type=int, default=3, help="default 3")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, [*options.overrides, f"target.server={options.server}"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    served = ServedTarget(recipe.target, device, recipe.data.max_length)
    frozen = FrozenTarget.from_recipe(recipe.target, device, dtype=str(served.dtype)[6:])
    data = load_training_data(encoder_of(recipe))
    collator, size = make_collator(recipe, 0), recipe.train.batch_size
    count = min(options.batches, len(data.train_rows) // size // (options.turns + 1))
    if count == 0:
        raise SystemExit(f"{len(data.train_rows)} sequences are too few for {options.turns + 1} turns")
    firsts = range(0, count * (options.turns + 1) * size, size)
    every = [collator([data.train_rows[0, first + j] for j in range(size)]) for first in firsts]
    turns = [every[i : i + count] for i in range(0, len(every), count)]
    no_rows = served.head_rows(torch.zeros(0, dtype=torch.int64)).to(device)

    def once(target: TargetBase, batches: list[dict[str, torch.Tensor]]) -> float:
        tokens, started = sum(int((batch["document_ids"] >= 0).sum()) for batch in batches), time.perf_counter()
        for i, batch in enumerate(batches):
            target.expect(batches[i:])
            target.outputs(batch, no_rows).last_hidden.sum().item()
        return tokens / (time.perf_counter() - started)

    rates = [(once(served, turn), once(frozen, turn)) for turn in turns][1:]  # the first turn warms up
    rows = [["", *(f"turn {i + 1}" for i in range(options.turns))]]
    rows += [[name, *(f"{rate:,.0f}" for rate in each)] for name, each in zip(("vLLM", "here"), zip(*rates))]
    print(f"{count} batches a turn, tokens/s in each of {options.turns} turns:\n{aligned(rows, right=True)}")
    print(f"vLLM over here: {statistics.median(a / b for a, b in rates):.2f} (median of turns)")


if __name__ == "__main__":
    main()
