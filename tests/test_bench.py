"""tools/bench_segments.py and tools/measure.py: what they count, against numbers worked out by hand."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import bench_segments
import measure
from bench_segments import Bench, Case, Settings

FIELDS = {"mode", "n", "segments", "layers", "wall_s", "cpu_s", "saved_bytes", "peak_bytes", "flops", "rows"}


def test_a_configuration_is_measured_and_one_that_dies_is_reported(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.json"

    def run_bench(*arguments: str) -> int:
        shape = "--layers 1 --hidden 32 --vocab 128 --repeats 1 --n 64 --json".split()
        monkeypatch.setattr(sys, "argv", ["bench_segments.py", *shape, str(out), *arguments])
        return bench_segments.main()

    assert run_bench("--segments", "4", "--modes", "relay") == 0
    (row,) = json.loads(out.read_text())
    assert (row["mode"], row["segments"]) == ("relay", 4)
    assert row["died"] is None and row["n"] == 64 and row["layers"] == 1
    assert all(row[name] > 0 for name in FIELDS - {"mode", "peak_bytes"}) and row["peak_bytes"] >= 0
    assert row["rows"] > row["rows_no_grad"] > 0
    assert 0.85 < row["saved_ratio"] < 1.15 and row["planned_peak_bytes"] > 0
    assert "relay" in capsys.readouterr().out
    assert run_bench("--segments", "1", "--timeout", "0.01") == 1
    assert [row["died"] for row in json.loads(out.read_text())] == ["took more than 0.01 s"] * 2
    assert "died: flat n=64 S=1: took more than 0.01 s" in capsys.readouterr().out


# ---- rows and flops, by hand


def test_work_of_the_relay():
    """Four tokens are three rows; with K = 2 and r = 1 the elements (anchor, depth) are (0,0) (1,0) (2,0) (0,1) (1,1): row
    0 is in no pool of depth 1. They see 1, 2, 3, 2, 3 keys. Uniform halves: columns 0 and 1 hold (0,0) (1,0) (0,1), columns
    2 and 3 hold (2,0) (1,1).
    """
    H, KV, inner = 32, 16, 48
    sizes = {"layers": 2, "hidden": H, "intermediate": inner, "heads": 2, "kv_heads": 1, "vocab": 40}
    counted = Bench(Settings(**sizes, depths=2, ratio=1.0, boundaries="uniform")).count(Case("relay", 4, 2))
    fc, mlp = 3 * H * H, 3 * H * inner
    q_o, k_v = (2 * H * H + H * H, H * H + H * H), (2 * H * 2 * KV, H * 2 * KV)  # parameters, by layer

    def forward(rows: int, depth0: int, last: int) -> int:
        """A pass without its attention: `depth0` slots read features, `last` rows run the last layer."""
        with_mask = 2 * fc * (depth0 + 1)  # and the mask's row
        return with_mask + 2 * rows * (q_o[0] + k_v[0] + mlp + k_v[1]) + 2 * last * (q_o[1] + mlp)

    def both_ways(rows: int, depth0: int) -> int:
        """Every matmul comes back as two, but that the features want no gradient."""
        return 3 * forward(rows, depth0, rows) - 2 * fc * depth0

    # Pass A: columns 0 and 1, through the first layer and the second's keys and values.
    pairs_a, pairs_b = 1 + 2, 2 * (1 + 2 + 3 + 2 + 3)
    assert (counted["rows"], counted["rows_no_grad"]) == (5, 2)
    matmuls = forward(2, 2, 0) + both_ways(3, 2) + both_ways(2, 1)
    assert counted["flops"] == matmuls + 4 * pairs_a * H + 12 * pairs_b * H
    assert counted["buffer_bytes"] == 2 * 4 * 4 * KV * 4  # layers; k, v and their gradients; columns; width; float32


# ---- saved bytes of graphs that one can see through


def test_saved_bytes_of_a_small_graph():
    weight = torch.nn.Parameter(torch.randn(8, 8))
    a = torch.randn(16, 8, requires_grad=True)  # 512 bytes

    def build(mask: torch.Tensor) -> torch.Tensor:
        squashed = (a @ weight).sigmoid()  # saves a (512), and the weight; sigmoid saves its result (512)
        squared = squashed * squashed  # saves the same storage twice more
        head = squared[:4].exp()  # saves its result, 4 * 8 * 4 = 128
        return torch.where(mask, squared, 0).sum() + head.sum()  # saves the mask

    mask = torch.rand(16, 8) > 0.5
    with measure.SavedBytes(lambda: [weight]) as saved:
        build(mask).backward()
        build(mask).backward()  # the first one's have been let go
    assert saved.peak_bytes == 512 + 512 + 128
    with measure.SavedBytes() as saved:
        loss = build(mask) + build(mask)  # at once: a is shared
        loss.backward()
    assert saved.peak_bytes == 512 + 256 + 2 * (512 + 128)
    big = torch.randn(1024, requires_grad=True)
    with measure.SavedBytes() as saved:  # a view counts with its whole storage
        (big[:2] * big[2:4]).sum().backward()
    assert saved.peak_bytes == 4096
