"""How fast a machine of GPUs would train: FLOPs of both sides, and how many GPUs a server of the target should get.

Counted from shapes, nothing is run: a matrix of n numbers takes 2 n FLOPs a token forwards and 4 n backwards, attention 4 a
visible pair and query number, and 10 backwards. A document fills its sequence. What share of their peak GPUs reach is
assumed; communication, loading and waiting are not counted. L: tokens of a sequence, S: segments, C: slots of one.
"""

import math
from dataclasses import replace

from peagle_train import memory
from peagle_train.config import Recipe, with_segments
from peagle_train.data.training_data import make_collator
from peagle_train.files import aligned
from peagle_train.machine import GIB, GPUS, Device
from peagle_train.target_model.frozen import FrozenTarget

PEAK_SHARE = 0.4  # of the GPUs' peak that both sides reach: assumed, not measured
SERVER_SHARE = 0.85  # of a server's memory that the target's weights may take; keys and values need the rest


def visible(length: int, window: int | None) -> float:
    """Positions that one of `length` sees on average, itself included."""
    W = min(length, window or length)
    return W - W * (W - 1) / (2 * length)


def target_flops(target: FrozenTarget, length: int) -> tuple[float, float]:
    """Of matrices, and of attention, in a sequence's forward without the head; of experts, those that a token takes.
    ValueError: its config does not say how many that are.
    """
    config, embeddings = target.config, target.model.get_input_embeddings().weight
    taken, there = (
        next((n for key in keys if isinstance(n := getattr(config, key, None), int)), 0)
        for keys in (("num_experts_per_tok", "moe_topk"), ("num_experts", "num_local_experts", "n_routed_experts"))
    )
    matrices = 0.0
    for name, weight in target.base.named_parameters():
        is_expert = ".experts." in name
        if is_expert and not taken * there:
            raise ValueError(f"target {type(target.model).__name__} has experts, its config no num_experts_per_tok")
        if weight.dim() > 1 and weight is not embeddings:
            matrices += weight.numel() * (taken / there if is_expert else 1)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    pairs = length * sum(visible(length, window if kind == "sliding_attention" else None) for kind in kinds)
    return 2 * length * matrices, 4 * pairs * config.num_attention_heads * head_dim


def draft_flops(s: memory.Sizes, num_segments: int) -> tuple[float, float]:
    """Of matrices in padded passes, and of attention, in the forward and backward of a sequence that is all learned."""
    train, cod, L, S = s.recipe.train, s.recipe.cod, s.recipe.data.max_length, num_segments
    elements = make_collator(with_segments(s.recipe, 1), seed=0).capacity
    one, C = memory.largest_pass(s, S), memory.capacity_of(s, S)
    passes = S if cod.boundaries == "uniform" else min(S, -(-elements // max(1, C - cod.num_depths + 1)))
    N, Q, M = (passes * n / train.batch_size for n in (one.N, one.Q, one.M))

    last = s.draft.num_hidden_layers - 1
    width = s.draft.hidden_size * (1 if last else 2)
    of_all = s.all_layers - s.layer_weights(last) + 2 * width * s.kv_size  # what all N go through; the Q also the rest
    seen = visible(L, s.draft.sliding_window) * s.query_size
    again = 1 if train.activation_checkpointing else 0
    layers = (6 + 2 * again) * (N * of_all + Q * (s.all_layers - of_all))
    attention = (14 + 4 * again) * seen * ((last + 1) * elements + last * (N - Q))
    if S > 1 and train.segment_mode == "relay":  # pass A, over all segments but the last: see `context_chunks`
        run = min(L, C)
        layers += 2 * math.ceil(L * (1 - 1 / S) / run) * run * of_all
        attention += 4 * seen * L * (1 - 1 / passes) * last
    H, T = s.draft.hidden_size, s.draft.target_hidden_size
    heads = H * (6 if s.recipe.draft.trains_head(H == T) else 4) + 2 * T
    return layers + 4 * M * s.fc_weights + Q * s.draft.draft_vocab_size * heads, attention


def plan_throughput(recipe: Recipe, gpu: str, count: int, tokens: int) -> str:
    """Tables of tokens a second by how `count` GPUs are shared out, and of what features of an epoch of `tokens` take."""
    (gib, teraflops), L, asked = GPUS[gpu], recipe.data.max_length, recipe.cod.num_segments
    recipe = replace(recipe, target=replace(recipe.target, cache=None, server=None, shard=False))
    budget = int(gib * GIB)
    target = memory.read_target(recipe, device := Device("cuda", budget, count))
    beside = memory.read_sizes(recipe, device, target)
    alone, draft = replace(beside, target_weights=0, target_forward=0), beside.draft

    def fits(sharded: bool) -> str:
        there = replace(alone, device=Device("cuda", budget, ranks), sharded=sharded and ranks > 1)
        found = memory.choose_segments(there)
        return f"S = {found.num_segments}, {found.peak / GIB:.0f} GiB" if found else "does not fit"

    chosen = memory.choose_segments(alone)
    S = asked if asked != "auto" else chosen.num_segments if chosen else min(L, memory.CANDIDATES[-1])
    rows = [["TFLOP a sequence", "matrices", "attention", "tokens/s a GPU"]]
    flops = {"target's forward": target_flops(target, L), "drafter's step": draft_flops(alone, S)}
    serve, train = (PEAK_SHARE * teraflops * 1e12 * L / sum(parts) for parts in flops.values())
    for (name, parts), pace in zip(flops.items(), (serve, train)):
        rows.append([name, *(f"{part / 1e12:,.0f}" for part in parts), f"{pace:,.0f}"])

    least = -(-beside.target_weights // int(SERVER_SHARE * budget))  # GPUs that hold the target
    reuse = recipe.target.reuse
    fresh = serve * reuse  # each forward's tokens are trained on so often
    splits = {n: min(n * fresh, (count - n) * train) for n in range(least, count)}
    best = max(splits, key=lambda n: splits[n], default=0)
    ways = {f"{n} server + {count - n} training{'*' * (n == best)}": pace for n, pace in splits.items()}
    no = "" if memory.choose_segments(beside) else ": too little memory"
    ways[f"{count} with the target beside the drafter{no}"] = count / (1 / fresh + 1 / train)
    ways |= {f"{count} writing target.cache": count * serve, f"{count} training from it": count * train}
    by_way = [["GPUs", "tokens/s", "hours an epoch"]]
    by_way += [[way, f"{pace:,.0f}", f"{tokens / pace / 3600:,.1f}"] for way, pace in ways.items()]

    ranks, token = count - best, (draft.feature_size + draft.target_hidden_size) * beside.target_bytes
    return f"""\
throughput from FLOPs, not measured: {count} {gpu} at an assumed {PEAK_SHARE:.0%} of {teraflops} TFLOP/s (bfloat16, dense)
{L:,} tokens a sequence, all of them learned, S = {S}; {tokens:,} tokens an epoch, target.reuse {reuse}
{aligned(rows, right=True)}

{aligned(by_way, right=True)}

drafter of {beside.parameters / 1e9:.2f} billion parameters on {ranks} {gpu}:
  DDP {fits(sharded=False)}; FSDP2 {fits(sharded=True)}
features, at most: {token / 1024:g} KiB a token, {tokens * token / 1e12:.2f} TB an epoch"""
