#!/usr/bin/env python3
"""Train a P-EAGLE drafter with transformers' Trainer: its loop, schedule, logging and arguments; our collator and step.

A Trainer's step is one forward and one backward; ours is one of each for every segment, so `training_step` is replaced. One
process only: gradients that no DDP forward made would not be reduced (peagle_train's own loop does that).
"""

import argparse
import sys

EPILOG = """example:
  python recipes/hf_trainer.py TARGET_FOLDER rows.jsonl runs/hf --mask-token-id 151669
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
    parser.add_argument("--recompute", action="store_true", help="Algorithm 1 in the relay's place")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    import json
    from pathlib import Path

    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from peagle_train import (
        CODCollator,
        FrozenTarget,
        RelayBuffers,
        new_drafter,
        recompute_step,
        relay_step,
        save_drafter,
    )

    class SegmentTrainer(Trainer):
        """A Trainer whose step runs a batch's segments one after another."""

        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            batch = self._prepare_inputs(inputs)
            count = batch["supervised"].sum().clamp(min=1)
            scale = 1 / (count * self.args.gradient_accumulation_steps)
            outputs = target.outputs(batch, head)
            with self.compute_loss_context_manager():  # autocast, where bf16=True
                stats = step(model, batch, outputs, scale=scale)
            return (stats.loss / count / self.args.gradient_accumulation_steps).detach()

    class NextDraw(TrainerCallback):
        """Another COD draw of the same rows in every epoch."""

        def on_epoch_begin(self, args, state, control, **kwargs):
            collator.set_epoch(int(state.epoch))

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = FrozenTarget.load(options.target, device=device)
    draft = new_drafter(target, options.mask_token_id)
    head = target.head_rows(draft.draft_token_ids).to(device)
    buffers = RelayBuffers()
    step = recompute_step if options.recompute else lambda *a, **k: relay_step(*a, **k, buffers=buffers)
    collator = CODCollator(options.max_length, options.depths, num_segments=options.segments)
    arguments_ = TrainingArguments(
        output_dir=f"{options.out}.trainer",
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=1,
        remove_unused_columns=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=device.type == "cpu",
    )
    if arguments_.world_size > 1 or arguments_.n_gpu > 1:
        print("hf_trainer: error: one process and one device only: set CUDA_VISIBLE_DEVICES=0", file=sys.stderr)
        return 2
    rows = [json.loads(line) for line in Path(options.rows).read_text(encoding="utf-8").splitlines()]
    trainer = SegmentTrainer(
        model=draft, args=arguments_, train_dataset=rows, data_collator=collator, callbacks=[NextDraw()]
    )
    trainer.train()
    save_drafter(options.out, draft)
    print(f"drafter: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
