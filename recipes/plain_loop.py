#!/usr/bin/env python3
"""Train a P-EAGLE drafter in a loop of your own: the collator in a DataLoader, relay_step, AdamW, a folder for vLLM.

Everything that peagle_train's own loop adds (resume, several processes, evaluation) is left out, so that this is a page.
"""

import argparse
import sys

EPILOG = """example:
  python recipes/plain_loop.py TARGET_FOLDER rows.jsonl runs/plain --mask-token-id 151669
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", help="the target's folder in transformers' format")
    parser.add_argument("rows", help='a .jsonl of {"input_ids": [...], "loss_mask": [...]}')
    parser.add_argument("out", help="the drafter's folder, made here")
    parser.add_argument("--mask-token-id", type=int, required=True, help="a token that never occurs in the rows")
    parser.add_argument(
        "--max-length", type=int, default=2048, help="tokens of a row; rows are no longer (default 2048)"
    )
    parser.add_argument("--depths", type=int, default=8, help="K (default 8)")
    parser.add_argument("--segments", type=int, default=4, help="S: more take less memory (default 4)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    import json
    from pathlib import Path

    import torch
    from torch.utils.data import DataLoader

    from peagle_train import CODCollator, FrozenTarget, RelayBuffers, new_drafter, relay_step, save_drafter

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = FrozenTarget.load(options.target, device=device)
    draft = new_drafter(target, options.mask_token_id).to(device)
    head = target.head_rows(draft.draft_token_ids.cpu()).to(device)

    rows = [json.loads(line) for line in Path(options.rows).read_text(encoding="utf-8").splitlines()]
    collator = CODCollator(options.max_length, options.depths, num_segments=options.segments)
    loader = DataLoader(rows, batch_size=1, shuffle=True, collate_fn=collator)
    optimizer = torch.optim.AdamW([p for p in draft.parameters() if p.requires_grad], lr=options.learning_rate)
    buffers = RelayBuffers()  # keys, values and their gradients: allocated once
    for epoch in range(options.epochs):
        collator.set_epoch(epoch)  # another draw of the same rows
        for batch in loader:
            count = int(batch["supervised"].sum())
            if count == 0:
                continue  # nothing to learn from
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            outputs = target.outputs(on_device, head)
            stats = relay_step(draft, on_device, outputs, scale=1 / count, buffers=buffers)
            torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            print(f"epoch {epoch}  loss {float(stats.loss) / count:.4f}")
    save_drafter(options.out, draft)
    print(f"drafter: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
