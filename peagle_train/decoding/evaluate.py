"""`peagle-train evaluate` without its arguments: load, measure (in the real vLLM, too, if asked), write the report."""

import importlib.util
import logging
import os
from argparse import Namespace
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from peagle_train.data.documents import STDLIB
from peagle_train.data.vocab import load_tokenizer
from peagle_train.decoding.measure import Case, Result, compare, load_cases, measure, stdlib_cases, summarize
from peagle_train.distributed import check_device
from peagle_train.files import aligned, one_line, write_json
from peagle_train.serving.drafter_io import load_drafter, read_config
from peagle_train.serving.export import find_drafter, recipe_beside
from peagle_train.serving.formats import served_as
from peagle_train.target_model.frozen import FrozenTarget

logger = logging.getLogger(__name__)


def run(options: Namespace) -> tuple[str, bool]:
    """Measure as the command line says; returns the report for a person, and whether every greedy text is right."""
    if options.engine:
        check_vllm(options.temperature, options.dtype)
    if options.prompt_tokens and STDLIB not in options.prompts:
        raise ValueError("--prompt-tokens goes with --prompts stdlib: other prompts are taken whole")
    if options.json:
        options.json.open("a").close()  # an OSError now, not when everything has been measured
    folders = [find_drafter(folder) for folder in (options.checkpoint, *options.compare)]
    folder, recipe = folders[0], recipe_beside(folders[0])
    path = options.target or (recipe.target.path if recipe else None)
    if path is None or not Path(path).is_dir():
        given = path or "no recipe.yaml beside the drafter names it"
        raise ValueError(f"the target's folder is not known here ({given}): give --target DIR")
    trusted = options.trust_remote_code  # never because a recipe says so: the drafter's author wrote that
    if recipe and recipe.target.trust_remote_code and not trusted:
        logger.warning("%s's recipe trusts code of %s: give --trust-remote-code if you do, too", folder, path)
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.zeros(1, device=name).device
    except Exception as error:  # whatever a device's runtime raises
        raise ValueError(f"--device {name} cannot be used ({one_line(error, 200)})") from None
    check_device(device)
    drafts = [load_drafter(f) for f in folders]
    trained = recipe.cod.num_depths if recipe else served_as(read_config(folder))[0]
    K, seed = options.k or trained or 8, options.seed
    # before the target, which may take minutes to load
    tokenizer = load_tokenizer(path, trusted)
    if tokenizer is None:
        raise ValueError(f"prompts need the target's tokenizer, and {path} has none")
    cases, notes = list[Case](), list[str]()
    for name in options.prompts:
        if name == STDLIB:
            how = (drafts[0].config.vocab_size, options.limit, options.prompt_tokens or 256, seed)
            found, note = stdlib_cases([recipe_beside(f) for f in folders], tokenizer, *how)
        else:
            found, note = load_cases(name, tokenizer, options.limit)
        if (again := found[0].data_set) in {case.data_set for case in cases}:
            raise ValueError(f"two of --prompts are called {again}: give files of different names, each once")
        cases += found
        notes.append(note)
    layer_ids = drafts[0].config.eagle_aux_hidden_state_layer_ids
    target = FrozenTarget.load(path, dtype=options.dtype, device=device, layer_ids=layer_ids, trust_remote_code=trusted)
    target.check()
    eos = target.eos_token_ids()
    settings = {"max_tokens": options.max_tokens, "temperature": options.temperature, "seed": seed}
    results, left_out = measure(target, drafts, cases, K, **settings, tokenizer=tokenizer, eos=eos)
    if not results:
        raise ValueError(f"no prompt was left to measure on: {left_out}")
    dtype, others = str(drafts[0].dtype)[6:], [*enumerate(folders)][1:]
    report: dict[str, Any] = {
        "drafters": [str(f) for f in folders],
        "target": str(path),
        "dtype": dtype,
        "settings": {"k": K, **settings, "prompts": options.prompts, "limit": options.limit},
        "prompts": notes,
        "left_out": left_out,
        "figures": [summarize(results, i, seed) for i in range(len(folders))],
        "differences": [{"other": str(f), "by_data_set": compare(results, seed, i)} for i, f in others],
        "turns": [asdict(r) for r in results],
    }
    is_right = all(r.check["verdict"] != "bug" for r in results)
    if options.engine:
        del target, drafts  # vLLM needs the memory
        torch.cuda.empty_cache()
        positions = max(len(r.prompt) for r in results) + options.max_tokens + 2 * K
        engine = Engine(path, folder, K, dtype, positions, trusted)
        report["vllm"] = measure_in_vllm(engine, results, options.max_tokens, eos)
        is_right &= dtype != "float32" or not report["vllm"]["texts_that_differ"]
    if options.json:
        write_json(options.json, report)
    return describe(report), is_right


# The report for a person


LEGEND = """accepted length: tokens a pass of the target yields, its own included; loops (text that only repeats) left out
95 %: interval over prompts; by position: share of the drafts whose slot 1, 2, ... was accepted"""


def describe(report: dict[str, Any]) -> str:
    """What was measured: one table, its legend, and whether the texts are right."""
    s, verdicts = report["settings"], [turn["check"]["verdict"] for turn in report["turns"]]
    how = f"temperature {s['temperature']:g}" if s["temperature"] else "greedy"
    lines = [*report["prompts"]]
    lines += [f"left out: {count} ({reason})" for reason, count in report["left_out"].items()]
    lines.append(f"target {report['target']} in {report['dtype']}, {how}, at most {s['max_tokens']} tokens, batch 1")
    for folder, figures in zip(report["drafters"], report["figures"]):
        lines += ["", f"drafter {folder}", describe_table(figures)]
    lines += ["", LEGEND]
    for found in report["differences"]:
        lines.append(f"{report['drafters'][0]} less {found['other']}:")
        for name, row in ((name, row) for name, by_k in found["by_data_set"].items() for row in by_k):
            difference, interval = _number(row["difference"], "+.3f"), _interval(row["interval"])
            lines.append(f"  {name}, K = {row['k']}: {difference} ({interval})")
    if not s["temperature"]:
        lines.append(f"texts: {verdicts.count('same')} of {len(verdicts)} equal the target's own, token for token")
        if ties := verdicts.count("tie"):
            why = f"its two best logits tie within {report['dtype']}'s rounding, which is normal"
            lines[-1] += f"; {ties} first differ where {why}"
        for turn in report["turns"]:
            if turn["check"]["verdict"] == "bug":
                where = f"{turn['data_set']} {turn['id']}, turn {turn['turn'] + 1}, token {turn['check']['at']}"
                lines.append(f"  WRONG, and no tie: {where}")
    if "vllm" in report:
        lines += describe_vllm(report["vllm"])
    return "\n".join(lines)


def describe_table(summary: dict[str, Any]) -> str:
    """A line per data set and K."""
    table = [["data set", "in loops", "K", "accepted length", "95 %", "by position"]]
    for name, figures in summary.items():
        loops = f"{figures['repeated_tokens'] / max(1, figures['tokens']):.0%}"
        for row in figures["by_k"]:
            shares = " ".join(_number(share, ".2f") for share in row["accepted_by_position"])
            length, interval = _number(row["accepted_length"], ".3f"), _interval(row["interval"])
            table.append([name, loops, str(row["k"]), length, interval, shares])
    return aligned(table)


def _interval(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


# The real vLLM, greedily, one prompt at a time, on the prompts that our own decoder had


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

    def complete(self, prompt: Sequence[int], max_tokens: int, eos: Collection[int]) -> list[int]:
        """The answer's tokens."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, stop_token_ids=sorted(eos), detokenize=False
        )
        [output] = self._llm.generate({"prompt_token_ids": list(prompt)}, sampling, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    def counts(self) -> list[int]:
        """Of all answers: verified drafts, then accepted tokens by slot."""
        found = {metric.name: metric for metric in self._llm.get_metrics()}
        accepted = found["vllm:spec_decode_num_accepted_tokens_per_pos"].values
        return [found["vllm:spec_decode_num_drafts"].value, *accepted]


def check_vllm(temperature: float, dtype: str) -> None:
    """ValueError, one line, for what cannot be measured in vLLM."""
    if temperature or dtype == "float64":
        raise ValueError("--engine vllm is greedy and has no float64: leave --temperature and --dtype float64 out")
    if importlib.util.find_spec("vllm") is None:
        where = "install peagle-train where vLLM is (on a CPU, from a clone: bash tools/vllm_setup.sh)"
        raise ValueError(f"--engine vllm needs vLLM in this environment: {where}, and evaluate there")


def measure_in_vllm(engine: Engine, results: Sequence[Result], max_tokens: int, eos: Collection[int]) -> dict[str, Any]:
    """Every prompt in vLLM, for the report: its counts beside our own decoder's `results`, and which texts differ."""
    differ = []
    for result in results:
        tokens = engine.complete(result.prompt, max_tokens, eos)
        if tokens != result.tokens:
            differ.append({"data_set": result.data_set, "id": result.id, "turn": result.turn, "tokens": tokens})
    vllm, accepted = engine.counts(), [n for result in results for _, n in result.passes]
    K = len(vllm) - 1
    ours = [len(accepted), *(sum(n > k for n in accepted) for k in range(K))]
    return {
        "version": engine.version,
        "k": K,
        "vllm": _figures(vllm),
        "ours": _figures(ours),
        "texts": len(results),
        "texts_that_differ": differ,
    }


def _figures(counts: Sequence[int]) -> dict[str, Any]:
    passes, *accepted = counts
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
