"""How many drafted tokens the real vLLM accepts: greedily, one prompt at a time, on the prompts that our own decoder had.

Its counters before and after a prompt give the drafts that it verified and the tokens that it accepted.
"""

import importlib.util
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from peagle_train.decoding.measure import Result
from peagle_train.files import one_line


class Engine:
    """vLLM in this process or a child of it, as its own environment variables say. `dtype`: the target's, in which vLLM
    runs the drafter, too. `positions`: that prompts, answers and drafts need.
    """

    def __init__(self, target: str, drafter: Path, K: int, dtype: str, positions: int, trusted: bool) -> None:
        os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")  # our threads would not survive a fork
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm

        self.version = vllm.__version__
        drafting = {"method": "eagle3", "model": str(drafter), "num_speculative_tokens": K, "parallel_drafting": True}
        how: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trusted, "speculative_config": drafting}
        how |= {"max_num_seqs": 1, "max_model_len": positions, "enable_prefix_caching": False, "enforce_eager": True}
        how["max_num_batched_tokens"] = max(8192, positions)  # it drafts from a wrong token where a prompt is cut
        how["kv_cache_memory_bytes"] = positions + 256 << 20  # 1 MiB a token is more than models of 400B need
        try:
            self._llm = vllm.LLM(target, skip_tokenizer_init=True, disable_log_stats=False, **how)
        except Exception as error:  # of many types, many of its own
            raise ValueError(f"vLLM does not serve {drafter}: {one_line(error, 300)}") from error

    def counters(self) -> list[int]:
        """Verified drafts, then accepted tokens by slot, since it started."""
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


def check_vllm(temperature: float, dtype: str) -> None:
    """ValueError, one line, for what cannot be measured in vLLM."""
    if temperature or dtype == "float64":
        raise ValueError("--engine vllm is greedy and has no float64: leave --temperature and --dtype float64 out")
    if importlib.util.find_spec("vllm") is None:
        where = "install peagle-train where vLLM is (on a CPU, from a clone: bash tools/vllm_setup.sh)"
        raise ValueError(f"--engine vllm needs vLLM in this environment: {where}, and evaluate there")


def measure(engine: Engine, results: Sequence[Result], max_tokens: int, eos: Collection[int]) -> dict[str, Any]:
    """Every prompt in vLLM, for the report: its counts beside our own decoder's `results`, and which texts differ."""
    differ, vllm, ours = [], list[list[int]](), list[list[int]]()
    for result in results:
        before = engine.counters()
        tokens = engine.complete(result.prompt, max_tokens, eos)
        vllm.append([b - a for a, b in zip(before, engine.counters(), strict=True)])
        slots = range(len(before) - 1)
        ours.append([len(result.passes), *(sum(n > k for _, n in result.passes) for k in slots)])
        if tokens != result.tokens:
            differ.append({"data_set": result.data_set, "id": result.id, "turn": result.turn, "tokens": tokens})
    return {
        "version": engine.version,
        "k": len(vllm[0]) - 1,
        "vllm": _figures(vllm),
        "ours": _figures(ours),
        "texts": len(results),
        "texts_that_differ": differ,
    }


def _figures(counts: Sequence[Sequence[int]]) -> dict[str, Any]:
    passes, *accepted = map(sum, zip(*counts))
    shares = [n / passes if passes else 0.0 for n in accepted]
    return {"passes": passes, "accepted_length": 1 + sum(shares), "accepted_by_position": shares}


def describe_vllm(report: dict[str, Any]) -> list[str]:
    """Lines for a person."""
    lines = [f"K = {report['k']}, loops included:  accepted length  by position  passes"]
    for name, key in ((f"vLLM {report['version']}", "vllm"), ("our decoder", "ours")):
        figures = report[key]
        positions = " ".join(f"{share:.3f}" for share in figures["accepted_by_position"])
        lines.append(f"  {name}: {figures['accepted_length']:.3f}  {positions}  {figures['passes']}")
    differing = len(report["texts_that_differ"])
    lines.append(f"vLLM: {report['texts'] - differing} of {report['texts']} texts equal ours, token for token")
    return lines
