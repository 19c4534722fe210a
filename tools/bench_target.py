"""What a target's forward over one long document costs, whole and in chunks: peak memory over what was there, and time.

Each case is a process of its own. The model is random; its features, which both must hold, are told apart from the rest.
    python tools/bench_target.py --tokens 131072 --chunks 0,2048,512
"""

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tools.measure import MIB, PeakRSS, format_table, integers, run_process


def child(arguments: argparse.Namespace) -> None:
    import time

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from peagle_train.target_model.frozen import FrozenTarget

    H = arguments.hidden
    torch.manual_seed(0)
    shape = {"hidden_size": H, "intermediate_size": 4 * H, "num_hidden_layers": arguments.layers, "vocab_size": 512}
    heads = {"num_attention_heads": H // 64, "num_key_value_heads": max(1, H // 256), "head_dim": 16}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, max_position_embeddings=arguments.tokens))
    target = FrozenTarget(model, [0, 1, 2], chunk_tokens=arguments.chunk or None)
    ids = torch.randint(0, 512, (1, arguments.tokens))
    positions = torch.arange(arguments.tokens)[None]
    target.features(ids[:, :64], positions[:, :64])  # libraries make their buffers
    started = time.perf_counter()
    with PeakRSS() as peak:
        features, last = target.features(ids, positions)
    seconds = time.perf_counter() - started
    sums = [float(features.double().square().mean()), float(last.double().square().mean())]
    result = {"peak": peak.peak_bytes, "seconds": seconds, "sums": sums}
    Path(arguments.child).write_text(json.dumps(result), encoding="ascii")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131072, help="length of the document (default 131072)")
    parser.add_argument("--layers", type=int, default=3, help="its layers, at least 3 (default 3)")
    parser.add_argument("--hidden", type=int, default=64, help="width of the target, a multiple of 64 (default 64)")
    parser.add_argument(
        "--chunks",
        type=partial(integers, least=0),
        default="0,2048,512",
        help="chunk_tokens of each case, 0: whole (default 0,2048,512)",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--chunk", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return 0
    results = {}
    for chunk in arguments.chunks:
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/result.json"
            size = [
                "--tokens",
                str(arguments.tokens),
                "--hidden",
                str(arguments.hidden),
                "--layers",
                str(arguments.layers),
            ]
            died = run_process([sys.executable, __file__, *size, "--chunk", str(chunk), "--child", path])
            if died:
                print(f"chunks of {chunk}: {died}")
                continue
            results[chunk] = json.loads(Path(path).read_text())
    kept = 4 * 4 * arguments.hidden * arguments.tokens
    cache = 2 * 4 * arguments.layers * 16 * max(1, arguments.hidden // 256) * arguments.tokens
    print(f"{arguments.tokens} tokens, {arguments.layers} layers of width {arguments.hidden}, float32;"
          f" features {kept / MIB:,.0f} MiB, keys and values {cache / MIB:,.0f} MiB")  # fmt: skip
    first = next(iter(results.values()), None)
    rows = []
    for chunk, result in results.items():
        assert first is not None
        over = (result["peak"] - kept) / max(1, first["peak"] - kept)
        rows.append(
            [
                "whole" if chunk == 0 else f"chunks of {chunk}",
                f"{result['peak'] / MIB:,.0f}",
                f"{(result['peak'] - kept) / MIB:,.0f}",
                f"{over:.2f}",
                f"{result['seconds'] / first['seconds']:.2f}",
                f"{max(abs(a / b - 1) for a, b in zip(result['sums'], first['sums'])):.0e}",
            ]
        )
    print(format_table(["", "peak MiB", "without features", "ratio", "time ratio", "difference"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
