"""From measured prompts to a report: figures per data set and K with intervals, checks, and a table for a person."""

from collections.abc import Sequence
from typing import Any

from peagle_train.decoding.acceptance import Result
from peagle_train.decoding.bootstrap import difference_interval, ratio_interval
from peagle_train.decoding.replay import Tally
from peagle_train.training.metrics import expected_accepted_length

ALL = "all"
"""The name of all data sets together."""


def summarize(
    results: Sequence[Result], drafter: int, seed: int, trained_accuracy: Sequence[float] = ()
) -> dict[str, Any]:
    """One drafter's figures: by data set (and all together, where there are several), then by K.

    trained_accuracy: by depth, of the run's evaluation at the drafter's step; its expected lengths stand beside real ones.
    """
    return {
        name: {
            "prompts": len(_by_prompt(rows)),
            "turns": len(rows),
            "tokens": sum(len(r.tokens) for r in rows),
            "repeated_tokens": sum(r.repeated for r in rows),
            "ended": sum(r.ended for r in rows),
            "teacher_forced_accuracy": _teacher_forced(rows, drafter),
            "by_k": [
                _figures(rows, drafter, k, seed)
                | {
                    "expected_from_teacher_forcing": _expected(_teacher_forced(rows, drafter), k),
                    "expected_in_training": _expected(trained_accuracy, k),
                }
                for k in range(1, len(rows[0].drafted[drafter].by_k) + 1)
            ],
        }
        for name, rows in _sets(results).items()
    }


def compare(results: Sequence[Result], seed: int, other: int = 1) -> dict[str, Any]:
    """Accepted length of the first drafter less another's, on the same texts, with paired intervals."""
    out: dict[str, Any] = {}
    for name, rows in _sets(results).items():
        out[name] = []
        for k in range(1, min(len(rows[0].drafted[d].by_k) for d in (0, other)) + 1):
            series = []
            for drafter in (0, other):
                tallies = _tallies(rows, drafter, k, apart=False)
                series += [[t.tokens for t in tallies], [t.passes for t in tallies]]
            lengths = [_ratio(sum(series[i]), sum(series[i + 1])) for i in (0, 2)]
            difference = None if None in lengths else lengths[0] - lengths[1]  # type: ignore[operator]
            interval = difference_interval(series[0], series[1], series[2], series[3], seed)
            out[name].append({"k": k, "accepted_lengths": lengths, "difference": difference, "interval": interval})
    return out


def checks(results: Sequence[Result]) -> dict[str, Any]:
    """Whether the texts are the target's own, and the decodings' passes those of their replay."""
    verdicts = [r.check["verdict"] for r in results]
    return {
        "texts": {verdict: verdicts.count(verdict) for verdict in ("same", "tie", "bug", "none")},
        "differences": [
            {"data_set": r.data_set, "id": r.id, "turn": r.turn, **r.check}
            for r in results
            if r.check["verdict"] in ("tie", "bug")
        ],
        "replays_that_differ": [
            {"data_set": r.data_set, "id": r.id, "turn": r.turn}
            for r in results
            if r.check["verdict"] != "none" and r.replay_differs
        ],
    }


def run_figures(results: Sequence[Result], seed: int) -> dict[str, Any]:
    """The decoding itself, without replay: accepted length outside of repetition, by data set."""
    out = {}
    for name, rows in _sets(results).items():
        tallies = [sum((r.run[0] for r in prompt), Tally()) for prompt in _by_prompt(rows)]
        out[name] = _length(tallies, seed) | {"k": len(rows[0].run[0].accepted)}
    return out


def details(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Every turn, for the JSON file."""
    return [
        {
            "data_set": r.data_set,
            "id": r.id,
            "turn": r.turn,
            "prompt_tokens": len(r.prompt),
            "tokens": r.tokens,
            "repeated": r.repeated,
            "ended": r.ended,
            "check": r.check,
            "run": [vars(t) for t in r.run],
            "drafters": [
                {"by_k": [[vars(t) for t in pair] for pair in d.by_k], "hits": d.hits, "totals": d.totals}
                for d in r.drafted
            ],
        }
        for r in results
    ]


def _sets(results: Sequence[Result]) -> dict[str, list[Result]]:
    sets: dict[str, list[Result]] = {}
    for result in results:
        sets.setdefault(result.data_set, []).append(result)
    if len(sets) > 1:
        sets[ALL] = list(results)
    return sets


def _by_prompt(rows: Sequence[Result]) -> list[list[Result]]:
    """Turns of one conversation belong together: they are resampled as one."""
    prompts: dict[int, list[Result]] = {}
    for row in rows:
        prompts.setdefault(row.number, []).append(row)
    return list(prompts.values())


def _tallies(rows: Sequence[Result], drafter: int, k: int, apart: bool) -> list[Tally]:
    return [sum((r.drafted[drafter].by_k[k - 1][apart] for r in prompt), Tally()) for prompt in _by_prompt(rows)]


def _figures(rows: Sequence[Result], drafter: int, k: int, seed: int) -> dict[str, Any]:
    plain, apart = (_tallies(rows, drafter, k, side) for side in (False, True))
    together = [a + b for a, b in zip(plain, apart)]
    total, repeating, both = (sum(t, Tally()) for t in (plain, apart, together))
    chain = [_ratio(a, total.passes) for a in total.accepted]
    given = [_ratio(a, before) for a, before in zip(total.accepted, [total.passes, *total.accepted])]
    emitted = sum(len(r.tokens) for r in rows)
    return {
        "k": k,
        **_length(plain, seed),
        "accepted_by_position": chain,
        "accepted_by_position_given_those_before": given,
        "in_repetition": _length(apart, seed),
        "with_repetition": _length(together, seed),
        "tokens_per_target_pass": _ratio(emitted, both.passes + len(rows)),  # a prompt's own pass counted
        "passes_in_repetition": repeating.passes,
    }


def _length(tallies: Sequence[Tally], seed: int) -> dict[str, Any]:
    tokens, passes = [t.tokens for t in tallies], [t.passes for t in tallies]
    return {
        "accepted_length": _ratio(sum(tokens), sum(passes)),
        "interval": ratio_interval(tokens, passes, seed),
        "passes": sum(passes),
    }


def _expected(accuracy: Sequence[float], k: int) -> float | None:
    return expected_accepted_length(accuracy[:k]) if k <= len(accuracy) else None


def _teacher_forced(rows: Sequence[Result], drafter: int) -> list[float]:
    """By slot: what training's figure would say of these texts: every position, not only those where passes begin."""
    drafted = [r.drafted[drafter] for r in rows]
    hits = [sum(column) for column in zip(*(d.hits for d in drafted))]
    totals = [sum(column) for column in zip(*(d.totals for d in drafted))]
    return [h / t if t else 0.0 for h, t in zip(hits, totals)]


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None


def describe_table(summary: dict[str, Any]) -> str:
    """A line per data set and K."""
    header = ["data set", "K", "accepted length", "95 %", "teacher-forced", "in training", "in loops", "with loops"]
    header += ["tokens/pass", "accepted by position"]
    lines = [header]
    for name, figures in summary.items():
        for row in figures["by_k"]:
            positions = " ".join(_number(p) for p in row["accepted_by_position"])
            in_loops, with_loops = (row[key]["accepted_length"] for key in ("in_repetition", "with_repetition"))
            numbers = [_number(row[f"expected_{key}"], 3) for key in ("from_teacher_forcing", "in_training")]
            numbers += [_number(v) for v in (in_loops, with_loops, row["tokens_per_target_pass"])]
            cells = [name, str(row["k"]), _number(row["accepted_length"], 3), show_interval(row["interval"])]
            lines.append([*cells, *numbers, positions])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines)


def show_interval(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
