"""How many drafted tokens the real vLLM accepts: greedily, one prompt at a time, on the prompts that our own decoder had.

An engine is vLLM's `LLM` (made here) or a running server; its counters before and after a prompt give the drafts that
it verified and the tokens that it accepted.
"""

import http.client
import importlib.util
import json
import os
import re
import time
import urllib.request
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peagle_train.decoding.measure import Result, ratio_interval
from peagle_train.decoding.replay import Tally
from peagle_train.files import one_line

LONGEST_WAIT = 10.0
"""Seconds for a server's counters to know of a request that it has answered."""


@dataclass
class Answer:
    """What an engine did with one prompt."""

    tokens: list[int]
    passes: int  # verified drafts
    accepted: list[int]  # by slot
    seconds: float  # the prompt's included


class LocalEngine:
    """vLLM in this process or a child of it, as its own environment variables say.

    Args:
        drafter: a drafter's folder in either format; None serves the target alone.
        dtype: the target's, in which vLLM runs the drafter, too.
        positions: that prompts, answers and drafts need.
        compiled: whether vLLM may compile and capture graphs, which takes minutes and gains speed.
        trusted: whether code that comes with the target may run.
    """

    def __init__(
        self, target: str, drafter: Path | None, K: int, dtype: str, positions: int, compiled: bool, trusted: bool
    ) -> None:
        os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")  # our threads would not survive a fork
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm

        self.version = vllm.__version__
        options: dict[str, Any] = {}
        if drafter is not None:
            settings = {"method": "eagle3", "model": str(drafter), "num_speculative_tokens": K}
            options = {"speculative_config": {**settings, "parallel_drafting": True}, "disable_log_stats": False}
        self._drafts = drafter is not None
        try:
            self._llm = vllm.LLM(
                target,
                dtype=dtype,
                trust_remote_code=trusted,
                max_num_seqs=1,
                max_model_len=positions,
                max_num_batched_tokens=max(8192, positions),  # it drafts from a wrong token where a prompt is cut
                kv_cache_memory_bytes=positions + 256 << 20,  # 1 MiB a token is more than models of 400B need
                enable_prefix_caching=False,
                enforce_eager=not compiled,
                skip_tokenizer_init=True,
                **options,
            )
        except Exception as error:  # of many types, many of its own
            raise ValueError(f"vLLM does not serve {drafter or target}: {one_line(error, 300)}") from error

    def counters(self) -> list[int]:
        """Verified drafts, then accepted tokens by slot, since it started; [] without a drafter."""
        if not self._drafts:
            return []
        found = {metric.name: metric for metric in self._llm.get_metrics()}
        accepted = found["vllm:spec_decode_num_accepted_tokens_per_pos"].values
        return [found["vllm:spec_decode_num_drafts"].value, *accepted]

    def complete(self, prompt: Sequence[int], max_tokens: int, eos: Collection[int]) -> list[int]:
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, stop_token_ids=sorted(eos), detokenize=False
        )
        [output] = self._llm.generate({"prompt_token_ids": list(prompt)}, sampling, use_tqdm=False)
        return list(output.outputs[0].token_ids)


class Server:
    """A running server; nobody else may use it meanwhile. ValueError if it is none, or has no drafter."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.model = json.loads(self._ask("/v1/models"))["data"][0]["id"]
        self.version = json.loads(self._ask("/version"))["version"]
        if not self.counters():
            raise ValueError(f"--base-url {base_url} serves no drafter: its /metrics count no drafts")

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.base_url + path, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request) as response:
                return response.read().decode()
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ValueError(f"--base-url: {self.base_url}{path}: {one_line(error)}") from None

    def counters(self) -> list[int]:
        text, name = self._ask("/metrics"), "vllm:spec_decode_num_"
        drafts = re.findall(rf"^{name}drafts_total\{{.*\}} (\S+)$", text, re.MULTILINE)
        accepted = re.findall(
            rf'^{name}accepted_tokens_per_pos_total\{{.*position="(\d+)".*\}} (\S+)$', text, re.MULTILINE
        )
        in_order = sorted((int(position), int(float(count))) for position, count in accepted)
        return [sum(int(float(count)) for count in drafts), *(count for _, count in in_order)] if accepted else []

    def complete(self, prompt: Sequence[int], max_tokens: int, eos: Collection[int]) -> list[int]:
        body = {"model": self.model, "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0}
        body |= {"ignore_eos": True, "stop_token_ids": sorted(eos), "return_token_ids": True}
        [choice] = json.loads(self._ask("/v1/completions", body))["choices"]
        return choice["token_ids"]


Engine = LocalEngine | Server


def check_vllm(temperature: float, dtype: str, base_url: str | None, speed: bool) -> None:
    """ValueError, one line, for what cannot be measured in vLLM."""
    if temperature:
        raise ValueError(f"--engine vllm is greedy, but --temperature is {temperature}: leave it out")
    if dtype == "float64":
        raise ValueError("--engine vllm has no float64: give --dtype float32 or bfloat16")
    if base_url and speed:
        raise ValueError("--speed needs vLLM with and without the drafter, and --base-url is one server: leave one out")
    if not base_url and importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "--engine vllm needs vLLM in this environment: bash tools/vllm_setup.sh, then"
            " .venv-vllm/bin/peagle-train evaluate ...; or give a server's --base-url"
        )


def ask(engine: Engine, prompt: Sequence[int], max_tokens: int, eos: Collection[int]) -> Answer:
    """Answer one prompt, and read the engine's counters before and after it."""
    before, start = engine.counters(), time.perf_counter()
    tokens = engine.complete(prompt, max_tokens, eos)
    seconds = time.perf_counter() - start
    while True:
        passes, *accepted = (b - a for a, b in zip(before or [0], engine.counters() or [0], strict=True))
        if not before or 1 + passes + sum(accepted) >= len(tokens):
            return Answer(tokens, passes, accepted, seconds)
        if time.perf_counter() - start - seconds > LONGEST_WAIT:
            raise ValueError("--base-url: the server's /metrics do not count what it answers")
        time.sleep(0.05)


def measure(
    engine: Engine,
    plain: Engine | None,
    results: Sequence[Result],
    max_tokens: int,
    eos: Collection[int],
    dtype: str,
    seed: int = 0,
) -> dict[str, Any]:
    """Every prompt in vLLM, for the report: counts beside ours, and why they differ.

    Args:
        plain: vLLM without the drafter, to compare speeds with, in turns; None measures none.
        results: our own decoder's, with as many slots.
        dtype: of the target and the drafter.
    """
    engines = [engine] if plain is None else [engine, plain]
    if plain is not None:
        for each in engines:  # the first prompt may compile and allocate
            ask(each, results[0].prompt, max_tokens, eos)
    pairs: list[dict[Engine, Answer]] = []
    for result in results:
        pairs.append({each: ask(each, result.prompt, max_tokens, eos) for each in engines})
        engines.reverse()  # in turns
    theirs = [answers[engine] for answers in pairs]
    ours = sum((tally for r in results for tally in r.run), Tally())
    near = 2 if dtype in ("bfloat16", "float16") else 64
    parted: list[dict[str, Any]] = []
    for r, answer in zip(results, theirs):
        what, ulps = compare(r, answer)
        if what != "same":
            parted.append({"data_set": r.data_set, "id": r.id, "turn": r.turn, "part_in": what, "ulps": ulps})
    nearly = sum(p["ulps"] is not None and p["ulps"] <= near for p in parted)
    leads = {"tokens": [x for r in results for x in r.leads], "drafted": [x for r in results for x in r.draft_leads]}
    report: dict[str, Any] = {
        "version": engine.version,
        "k": len(ours.accepted),
        "vllm": _figures(sum(a.passes for a in theirs), [sum(n) for n in zip(*(a.accepted for a in theirs))]),
        "ours": _figures(ours.passes, ours.accepted),
        "prompts": {"same": len(results) - len(parted), "near_tie": nearly, "other": len(parted) - nearly},
        "near_ulps": near,
        "near_ties": {name: [sum(x <= near for x in values), len(values)] for name, values in leads.items()},
        "parted": parted,
        "turns": [asdict(answer) for answer in theirs],
    }
    if plain is not None:
        times, plain_times = ([a[e].seconds / len(a[e].tokens) for a in pairs] for e in (engine, plain))
        report["speed"] = {
            "tokens_per_second": len(times) / sum(times),
            "without_drafter": len(times) / sum(plain_times),
            "speed_up": sum(plain_times) / sum(times),
            "interval": ratio_interval(plain_times, times, seed),
        }
    return report


def compare(result: Result, answer: Answer) -> tuple[str, float | None]:
    """Whether vLLM did what our decoder did: "same"; else by how many ulp our logits led where they part.

    Of counts that differ on the same text it is the smallest lead of any draft.
    """
    if answer.tokens != result.tokens:
        same = zip(answer.tokens, result.tokens)
        at = next((i for i, (a, b) in enumerate(same) if a != b), len(result.tokens))
        return "text", result.leads[at] if at < len(result.leads) else None
    ours = sum(result.run, Tally())
    more = [theirs - mine for theirs, mine in zip(answer.accepted, ours.accepted, strict=True)]
    # vLLM counts what it accepts after an end token, too
    if answer.passes == ours.passes and all(0 <= n <= result.ended for n in more):
        return "same", None
    return "drafts", min(result.draft_leads, default=None)


def _figures(passes: float, accepted: Sequence[float]) -> dict[str, Any]:
    shares = [n / passes if passes else 0.0 for n in accepted]
    return {"passes": passes, "accepted_length": 1 + sum(shares), "accepted_by_position": shares}


def describe_vllm(report: dict[str, Any]) -> str:
    """The measurement for a person."""
    lines = []
    for name, key in ((f"vLLM {report['version']}", "vllm"), ("our decoder", "ours")):
        figures = report[key]
        positions = " ".join(f"{share:.3f}" for share in figures["accepted_by_position"])
        lines.append(
            f"{name}, K = {report['k']}, with loops: {figures['accepted_length']:.3f}; by position {positions};"
            f" {figures['passes']:.0f} passes"
        )
    prompts, near = report["prompts"], report["near_ties"]
    lines.append(
        f"vLLM's texts and counts: {prompts['same']} are ours, {prompts['near_tie']} part from ours at a near-tie (at most"
        f" {report['near_ulps']} ulp), {prompts['other']} elsewhere; near-ties of ours: {near['tokens'][0]} of"
        f" {near['tokens'][1]} tokens, {near['drafted'][0]} of {near['drafted'][1]} drafted ones"
    )
    for p in report["parted"]:
        ulps = "-" if p["ulps"] is None else round(p["ulps"], 1)
        lines.append(f"  {p['data_set']} {p['id']}, turn {p['turn'] + 1}: other {p['part_in']}, ours led by {ulps} ulp")
    if "speed" in report:
        speed = report["speed"]
        interval = "" if speed["interval"] is None else " ({:.3f} to {:.3f})".format(*speed["interval"])
        lines.append(
            f"vLLM, tokens per second: {speed['tokens_per_second']:.2f} with the drafter, {speed['without_drafter']:.2f}"
            f" without: {speed['speed_up']:.3f} times as fast{interval}"
        )
    return "\n".join(lines)
