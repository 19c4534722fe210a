"""Slow, obvious answers to compare with, from the contract (docs/concepts.md): loops over elements, nothing shared.

An element is a pair (anchor, depth); a document is its number at every column, -1 on padding. Nothing here imports
peagle_train.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

Element = tuple[int, int]
Who = tuple[int, int, int]
"""Document, anchor and depth of an element."""


# Rows and draws


@st.composite
def packed_rows(draw: st.DrawFn, most: int, vocab: int) -> dict[str, list[int]]:
    """Documents of at most `most` tokens together, of ids below `vocab`."""
    lengths = draw(st.lists(st.integers(1, most), max_size=5).filter(lambda n: sum(n) <= most))
    n = sum(lengths)
    mask = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n) | st.just([1] * n) | st.just([0] * n))
    ids = draw(st.lists(st.integers(0, vocab - 1), min_size=n, max_size=n))
    documents = [i for i, length in enumerate(lengths) for _ in range(length)]
    return {"input_ids": ids, "loss_mask": mask, "document_ids": documents}


def drafter_rows(documents: Sequence[int]) -> list[int]:
    """Columns p with p and p + 1 in the same document."""
    last = len(documents) - 1
    return [p for p in range(last) if documents[p] >= 0 and documents[p] == documents[p + 1]]


def choose(pool: list[int], size: int, generator: torch.Generator) -> list[int]:
    """`size` of the pool by one permutation of it, sorted; a smaller pool is taken whole, without a draw."""
    if len(pool) < size:
        return pool
    order = torch.randperm(len(pool), generator=generator).tolist()
    return sorted(pool[i] for i in order[:size])


def draw_packed(
    mask: Sequence[int],
    documents: Sequence[int],
    K: int,
    r: float,
    r_min: float,
    generator: torch.Generator,
    max_anchors: int | None = None,
) -> list[Element]:
    """The elements of a packed, unshifted row."""
    rows = drafter_rows(documents)
    supervised = [p for p in rows if mask[p + 1]]
    firsts = [p for p in rows if p == 0 or documents[p - 1] != documents[p]]
    starts = supervised
    if max_anchors is not None and max_anchors < len(supervised):
        starts = choose(supervised, max_anchors, generator)
    pool = [p for p in starts if p not in firsts]
    elements = [(p, 0) for p in rows]
    for d in range(1, K):
        size = int(max(0, len(starts) - d) * max(r**d, r_min))
        if size == 0:
            break
        survivors = choose(pool, size, generator)
        elements += [(p - d, d) for p in survivors]
        pool = [p + 1 for p in survivors if p + 1 in supervised and p + 1 not in firsts]
    return elements


# Segments


def first_column(element: Element) -> int:
    """The column that decides the segment: the anchor's at depth 0, else the depth-1 ancestor's."""
    anchor, depth = element
    return anchor if depth == 0 else anchor + 1


def segment_of(element: Element, bounds: Sequence[int]) -> int:
    return max(s for s in range(len(bounds) - 1) if bounds[s] <= first_column(element))


def cut_greedily(elements: Iterable[Element], L: int, num_segments: int, capacity: int) -> list[int]:
    """Boundaries: column by column, a new segment where the next column no longer fits."""
    count = [0] * L
    for element in elements:
        count[first_column(element)] += 1
    bounds, filled = [0], 0
    for p in range(L):
        if filled + count[p] > capacity:
            bounds.append(p)
            filled = 0
        filled += count[p]
    return bounds + [L] * (num_segments + 1 - len(bounds))


def flat_order(elements: Iterable[Element], bounds: Sequence[int]) -> list[list[Element]]:
    """Each segment's elements: depth 0 by anchor, then every rollout contiguous by depth."""
    groups: list[list[Element]] = [[] for _ in bounds[1:]]
    for element in elements:
        groups[segment_of(element, bounds)].append(element)
    return [sorted(group, key=lambda e: (e[1] > 0, e[0], e[1])) for group in groups]


# The alignment contract


def positions(documents: Sequence[int]) -> list[int]:
    """Restarting with every document, 0 on padding."""
    out: list[int] = []
    for p, document in enumerate(documents):
        inside = p > 0 and document >= 0 and documents[p - 1] == document
        out.append(out[-1] + 1 if inside else 0)
    return out


def sees(query: Who, key: Who, window: int | None = None) -> bool:
    """With a window, what it leaves a query at position anchor + depth of the positions before it."""
    (q_document, q_anchor, q_depth), (k_document, k_anchor, k_depth) = query, key
    far = window is not None and q_anchor + q_depth - k_anchor >= window
    earlier = k_depth == 0 and k_document == q_document and k_anchor <= q_anchor and not far
    own_rollout = k_document == q_document and k_anchor == q_anchor and k_depth <= q_depth
    return earlier or own_rollout


def who_sees_whom(queries: Sequence[Who | None], keys: Sequence[Who | None], window: int | None = None) -> Tensor:
    """bool [queries, keys]; None is padding, which sees and is seen by nothing."""
    return torch.tensor([[bool(q and k and sees(q, k, window)) for k in keys] for q in queries], dtype=torch.bool)


def reached(who: Sequence[Who], learned: Sequence[bool], window: int | None = None, layers: int = 1) -> set[Who]:
    """The elements whose keys and values may change what a drafter of `layers` layers says at the learned ones."""
    needed = {one for one, is_learned in zip(who, learned, strict=True) if is_learned}
    for _ in range(layers):
        needed |= {key for key in who if any(sees(query, key, window) for query in needed)}
    return needed


# Attention and the drafter


def attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """[H, Q, D], [G, K, D] twice and bool [Q, K] to [Q, H * D]: a softmax by hand for every head and query."""
    H, Q, D = query.shape
    shared = H // key.shape[0]
    rows = []
    for q in range(Q):
        seen = [k for k in range(visible.shape[1]) if visible[q, k]]
        heads = []
        for h in range(H):
            if not seen:
                heads.append(query.new_zeros(D))
                continue
            scores = (key[h // shared, seen] @ query[h, q]) / math.sqrt(D)
            weights = (scores - scores.max().detach()).exp()
            heads.append((weights / weights.sum()) @ value[h // shared, seen])
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / ((x * x).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, position: Sequence[int], theta: float) -> Tensor:
    """[heads, n, D]: dimensions i and i + D/2 turn by position * theta^(-2i/D); angles in float32, as Llama's."""
    half = x.shape[-1] // 2
    frequency = 1.0 / theta ** (torch.arange(half).float() * 2 / x.shape[-1])
    angle = torch.tensor(position).float()[:, None] * frequency
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def drafter(
    weights: dict[str, Tensor],
    config: Any,
    tokens: Sequence[int],
    position: Sequence[int],
    features: Sequence[Tensor | None],
    visible: Tensor,
) -> Tensor:
    """[n, H] after the last norm: an EAGLE-3 drafter over n elements of one row, no features for a mask slot."""

    def heads(x: Tensor) -> Tensor:
        return torch.stack(x.split(config.head_dim, dim=-1))

    eps, theta = config.rms_norm_eps, config.rope_parameters["rope_theta"]
    embeds = torch.stack([weights["embed_tokens.weight"][t] for t in tokens])
    read = torch.stack([weights["mask_hidden"][0, 0] if f is None else f for f in features])
    if config.norm_before_fc:
        read = rms_norm(read, weights["input_norm.weight"], eps)
    if config.fc_norm:
        parts = read.split(config.target_hidden_size, dim=-1)
        read = torch.cat([rms_norm(part, weights[f"fc_norm.{i}.weight"], eps) for i, part in enumerate(parts)], dim=-1)
    x = read @ weights["fc.weight"].T
    for i in range(config.num_hidden_layers):
        w = {n.removeprefix(f"layers.{i}."): t for n, t in weights.items() if n.startswith(f"layers.{i}.")}
        inputs = rms_norm(embeds if i == 0 else x, w["input_layernorm.weight"], eps)
        if i == 0:
            normed = rms_norm(x, w["hidden_norm.weight"], eps)
            x = normed if config.norm_before_residual else x
            inputs = torch.cat([inputs, normed], dim=-1)
        query, key, value = (heads(inputs @ w[f"self_attn.{a}_proj.weight"].T) for a in "qkv")
        if config.layer_type == "qwen3":
            query, key = (rms_norm(x, w[f"self_attn.{a}_norm.weight"], eps) for x, a in ((query, "q"), (key, "k")))
        seen = attention(rotate(query, position, theta), rotate(key, position, theta), value, visible)
        x = x + seen @ w["self_attn.o_proj.weight"].T
        normed = rms_norm(x, w["post_attention_layernorm.weight"], eps)
        gate = normed @ w["mlp.gate_proj.weight"].T
        x = x + (gate * gate.sigmoid() * (normed @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
    return rms_norm(x, weights["norm.weight"], eps)


# The loss


def row_loss(logits: Tensor, target_logits: Tensor, kind: str) -> tuple[Tensor, bool]:
    """One element's loss, and whether the two argmaxes agree."""
    log_p, log_q = target_logits.log_softmax(-1), logits.log_softmax(-1)
    best = int(target_logits.argmax())
    if kind == "kl":
        loss = (log_p.exp() * (log_p - log_q)).sum()
    elif kind == "soft_ce":
        loss = -(log_p.exp() * log_q).sum()
    elif kind in ("tv", "lk"):
        overlap = torch.minimum(log_p.exp(), log_q.exp()).sum()
        share = torch.exp(-3 * overlap).detach() if kind == "lk" else 0.0
        loss = share * (log_p.exp() * (log_p - log_q)).sum() + (1 - share) * (1 - overlap)
    else:
        loss = -log_q[best]
    return loss, int(logits.argmax()) == best


def step(
    weights: dict[str, Tensor],
    config: Any,
    row: dict[str, Sequence[int]],
    elements: Sequence[Element],
    features: Tensor,
    last_hidden: Tensor,
    head: Tensor,
    kind: str = "kl",
    depth_decay: float = 1.0,
) -> tuple[Tensor, list[int], list[int]]:
    """A row's summed loss, and hits and supervised elements by depth.

    `row` has input_ids, loss_mask and document_ids, unpadded; features [n, 3T] and last_hidden [n, T] are its columns'.
    """
    ids, mask, documents = (list(row[name]) for name in ("input_ids", "loss_mask", "document_ids"))
    position = positions(documents)
    who: list[Who | None] = [(documents[a], a, d) for a, d in elements]
    hidden = drafter(
        weights,
        config,
        [ids[a + 1] if d == 0 else config.ptd_token_id for a, d in elements],
        [position[a] + d for a, d in elements],
        [features[a] if d == 0 else None for a, d in elements],
        who_sees_whom(who, who, config.sliding_window),
    )
    depths = max(d for _, d in elements) + 1
    total, hits, totals = hidden.new_zeros(()), [0] * depths, [0] * depths
    for i, (a, d) in enumerate(elements):
        if mask[a + d + 1]:
            loss, hit = row_loss(weights["lm_head.weight"] @ hidden[i], head @ last_hidden[a + d + 1], kind)
            total = total + loss * depth_decay**d
            hits[d] += hit
            totals[d] += 1
    return total, hits, totals
