"""A target behind vLLM servers, which compute its hidden states. Here only what lies around its layers is loaded: head,
embeddings and final norm, whatever its size.

Every document is a request of its own, up to the last position that training reads (`columns_read`), so packed documents
cannot see each other. vLLM answers with the name of a file in
a folder that it shares with us (`peagle-train serve-target` prints the command that starts such a server); the file is
locked until it is whole, and removed once it is read.

B: sequences of a batch, L: positions, n: tokens of a document, k: feature layers, T: the target's hidden size, V: its
vocabulary.
"""

import fcntl
import itertools
import logging
import math
import re
import threading
import time
from collections.abc import Sequence
from multiprocessing.pool import AsyncResult, ThreadPool  # its threads are daemons: no exit waits for an answer
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peagle_train.config import Target
from peagle_train.core.elements import columns_read
from peagle_train.core.passes import TargetOutputs
from peagle_train.data.vocab import eos_token_ids, load_config
from peagle_train.files import one_line
from peagle_train.target_model.frozen import FrozenTarget, TargetBase, TargetLost, pieces_of
from peagle_train.target_model.loading import default_layer_ids, read_tensors

logger = logging.getLogger(__name__)

REQUESTS = 32
"""In flight at a time, to each server."""
GREEDY = {"temperature": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Given explicitly: servers would take the missing ones from the target's generation_config.json."""
REMEDY = "start the server with the command that `peagle-train serve-target RECIPE` prints"


class ServedTarget(TargetBase):
    """A target that asks `target.server` for what training reads.

    Args:
        settings: the recipe's section. device: that the outputs are for. max_length: of a sequence.

    Raises:
        ValueError: one line, for a server that is none, or that serves another model or other layers.
    """

    def __init__(self, settings: Target, device: torch.device, max_length: int) -> None:
        assert settings.server
        self.settings, self.device = settings, device
        self.config = load_config(settings.path, settings.trust_remote_code).get_text_config()
        self.layer_ids = list(settings.layer_ids or default_layer_ids(self.num_layers))
        urls = [settings.server] if isinstance(settings.server, str) else settings.server
        patience = max(60.0, settings.server_patience)
        self.servers = [_Server(url, self.layer_ids, self.hidden_size, patience) for url in urls]
        if (longest := min(server.max_model_len for server in self.servers)) <= max_length:
            raise ValueError(
                f"target.server takes {longest} tokens; data.max_length and a token more are {max_length + 1}: {REMEDY}"
            )
        self._threads = ThreadPool(REQUESTS * len(urls))
        self._turns = itertools.count()
        self._stopping = threading.Event()
        self._coming: dict[int, tuple[dict[str, Tensor], Tensor, Tensor, list[AsyncResult[None]]]] = {}  # by batch id
        self._bytes = 0  # of the batches that are coming

        states = self._ask(torch.arange(1, 6))[0]
        self.dtype = states.dtype
        if settings.dtype not in ("auto", str(states.dtype)[6:]):
            raise ValueError(
                f"target.server computes in {str(states.dtype)[6:]}, target.dtype is {settings.dtype}: {REMEDY}"
            )
        self._token_bytes = (len(self.layer_ids) + 1) * self.hidden_size * self.dtype.itemsize
        self.ahead = int(settings.prefetch_gib * 2**30) // (max_length * self._token_bytes)
        self._head, self._embeddings, self._norm = _around_the_layers(settings, states.dtype)
        self._norm.to(device)
        self.vocab_size = self._head.shape[0]
        if settings.check:
            self.check()

    def eos_token_ids(self) -> list[int]:
        return eos_token_ids(self.config)

    def embedding_rows(self) -> Tensor:
        return self._embeddings

    def head_weight(self) -> Tensor:
        return self._head

    def final_norm(self) -> nn.Module:
        return self._norm

    def check(self) -> None:
        """ValueError unless the greedy token after a few prompts is the head's of the last hidden state here."""
        for start, _ in itertools.product((1, 100, 1000), self.servers):  # which take turns
            ids = torch.arange(start, start + 7) % self.vocab_size
            states, token = self._ask(ids)
            if not 0 <= token < self.vocab_size or states.dtype != self.dtype:
                raise ValueError(f"target.server answers with token {token} and {states.dtype} states: {REMEDY}")
            logits = self._head.float() @ self._norm(states[-1, -1].to(self.device)).float().cpu()
            if float(logits.max() - logits[token]) > 0.02 * float(logits.abs().max()):  # bfloat16 has near ties
                raise ValueError(
                    f"target.server answers {ids.tolist()} with token {token}, target.path {self.settings.path} with"
                    f" {int(logits.argmax())}: it serves another model, or other layers than {self.layer_ids}: {REMEDY}"
                )

    def expect(self, batches: Sequence[dict[str, Tensor]]) -> None:
        for batch in batches:
            size = batch["input_ids"].numel() * self._token_bytes
            if self._coming and self._bytes + size > self.settings.prefetch_gib * 2**30:
                return
            self._begin(batch)

    def _begin(self, batch: dict[str, Tensor]) -> None:
        if id(batch) in self._coming:
            return
        documents_BL = batch["document_ids"]
        learned = (batch["supervised"] & (batch["depth"] == 0)).long()
        is_supervised = torch.zeros_like(documents_BL).scatter_add_(1, batch["anchor"], learned) > 0
        is_needed = torch.stack(columns_read(is_supervised, documents_BL, self.reach)).any(0)
        # Allocated here: page-locked memory belongs to the device of the thread that asks for it.
        shape = int(is_needed.sum()), len(self.layer_ids) + 1, self.hidden_size
        room = torch.empty(shape, dtype=self.dtype, pin_memory=self.device.type == "cuda")
        parts, start = [], 0
        for b, documents in enumerate(documents_BL):
            for part in pieces_of(documents[documents >= 0]):
                needed = is_needed[b, part].nonzero()[:, 0]
                if n := needed.numel():
                    ids = batch["input_ids"][b, part][: int(needed[-1]) + 1]
                    parts.append(self._threads.apply_async(self._read, (ids, needed, room[start : start + n])))
                    start += n
        self._coming[id(batch)] = batch, is_needed.flatten().nonzero()[:, 0], room, parts
        self._bytes += room.nbytes

    def outputs(self, batch: dict[str, Tensor], head_rows: Tensor) -> TargetOutputs:
        self._begin(batch)
        started = time.perf_counter()
        _, index, room, parts = self._coming.pop(id(batch))
        for part in parts:
            part.get()
        self.waited += time.perf_counter() - started
        self._bytes -= room.nbytes
        index, states = (tensor.to(head_rows.device, non_blocking=True) for tensor in (index, room))
        B, L = batch["input_ids"].shape

        def spread(rows: Tensor) -> Tensor:
            return rows.new_zeros(B * L, *rows.shape[1:]).index_copy_(0, index, rows).view(B, L, -1)

        return TargetOutputs(spread(states[:, :-1]), spread(self._norm(states[:, -1])), head_rows)

    def _read(self, ids_n: Tensor, needed: Tensor, room: Tensor) -> None:
        room.copy_(self._ask(ids_n)[0][needed])

    def _ask(self, ids_n: Tensor) -> tuple[Tensor, int]:
        """The hidden states [n, k + 1, T] of a document, and the greedy token after it; the last ones before the norm.

        Raises:
            TargetLost: no server answered for `target.server_patience` seconds after the first failure.
            ValueError: a server answered something else, the first time that it was asked; later that is TargetLost.
        """
        until, failure = math.inf, "target.server gave no answer before"
        while not self._stopping.is_set():
            server = self.servers[next(self._turns) % len(self.servers)]
            try:
                return server.ask(ids_n)
            except ValueError as error:
                if server.has_answered:  # in the middle of a run, which is saved
                    raise TargetLost(str(error)) from None
                raise
            except OSError as error:  # among them openai's, see `_Server`
                failure = f"target.server {server.url} gave no answer: {one_line(error)}"
            if until == math.inf:
                until = time.monotonic() + self.settings.server_patience
                logger.warning("%s; asking again", failure)
            elif time.monotonic() > until:
                break
            self._stopping.wait(min(2.0, self.settings.server_patience))
        self._stopping.set()  # the other requests' threads need not try as long
        raise TargetLost(failure)

    def close(self) -> None:
        self._stopping.set()
        self._threads.terminate()


class _Server:
    """One vLLM server. `patience`: seconds that a request or its file may take."""

    def __init__(self, url: str, layer_ids: list[int], hidden_size: int, patience: float) -> None:
        try:
            import openai
        except ImportError:
            raise ValueError("target.server takes the package openai, which is missing: pip install openai") from None
        self.url, self.layer_ids, self.openai = url.rstrip("/").removesuffix("/v1"), layer_ids, openai
        self.hidden_size, self.patience, self.has_answered = hidden_size, patience, False
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=patience)
        try:
            [model, *_] = self.client.models.list().data
        except (openai.OpenAIError, ValueError) as error:
            raise ValueError(f"target.server {url} does not answer: {one_line(error)}; {REMEDY}") from None
        self.model, self.max_model_len = model.id, int(getattr(model, "max_model_len", 0))

    def ask(self, ids_n: Tensor) -> tuple[Tensor, int]:
        """See `ServedTarget._ask`; OSError where it gives no answer."""
        ids = ids_n.tolist()
        more = {"return_token_ids": True, "add_special_tokens": False, **GREEDY}
        try:
            reply = self.client.completions.create(model=self.model, prompt=ids, max_tokens=1, extra_body=more)
        except self.openai.APIStatusError as error:
            if error.status_code < 500 and error.status_code not in (408, 409, 425, 429):
                raise ValueError(
                    f"target.server {self.url} refuses a prompt of {len(ids)} tokens: {one_line(error)}"
                ) from None
            raise OSError(one_line(error)) from None
        except self.openai.OpenAIError as error:
            raise OSError(one_line(error)) from None
        path = states_path(reply)
        token = (getattr(reply.choices[0], "token_ids", None) or [-1])[0]
        if path is None:
            raise ValueError(f"target.server {self.url} gives no hidden states: {REMEDY}")
        named = re.fullmatch(r"layers-([\d-]+)", path.parent.name)
        if named and named[1] != (asked := layers_name(self.layer_ids)):
            raise ValueError(f"target.server {self.url} gives layers {named[1]}, the recipe asks for {asked}: {REMEDY}")
        try:
            states = take(path, ids, self.patience)
        except FileNotFoundError as error:
            if self.has_answered:  # it was restarted, and its folder emptied
                raise
            raise ValueError(
                f"target.server wrote {error.filename}, which is missing here: share that folder"
            ) from None
        if not named and not self.has_answered:
            words = (
                "target.server %s does not say which layers it gives: give it the folder of `peagle-train serve-target`"
            )
            logger.warning(words, self.url)
        if states.shape != (len(ids), len(self.layer_ids) + 1, self.hidden_size):
            raise ValueError(
                f"target.server {self.url} gives hidden states {tuple(states.shape)}, not those of {len(self.layer_ids)}"
                f" layers and the last: {REMEDY}"
            )
        self.has_answered = True
        return states, token


def states_path(reply: Any) -> Path | None:
    """The file of hidden states that a server's reply names; None if it names none."""
    path = (getattr(reply, "kv_transfer_params", None) or {}).get("hidden_states_path")
    return Path(path) if path else None


def layers_name(layer_ids: Sequence[int]) -> str:
    """In the name of a server's folder, so that another list of layers shows."""
    return "-".join(map(str, layer_ids))


def take(path: Path, ids: list[int], patience: float) -> Tensor:
    """Read and remove a server's file of hidden states, [n, k + 1, T]; waits until it is whole.

    Raises:
        FileNotFoundError: it has no lock. OSError: it is not whole after `patience` seconds, or never will be.
    """
    lock, until, pause = path.with_name(path.name + ".lock"), time.monotonic() + patience, 0.001
    with lock.open() as held:
        while True:
            try:
                fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise OSError(f"{path} was not whole after {patience:.0f} s") from None
            time.sleep(pause)  # flock itself would wait without limit
            pause = min(0.1, 2 * pause)
        try:
            tensors = load_file(path)
        except (FileNotFoundError, SafetensorError) as error:
            raise OSError(f"it ended while it wrote {path}") from error
    lock.unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    if tensors["token_ids"].tolist() != ids:
        raise ValueError(f"target.server wrote {path} for other tokens than it was asked for")
    return tensors["hidden_states"]


def _around_the_layers(settings: Target, dtype: torch.dtype) -> tuple[Tensor, Tensor, nn.Module]:
    """The target's head and embeddings [V, T] and its final norm, from its .safetensors files, on the CPU."""
    config = load_config(settings.path, settings.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=settings.trust_remote_code)
    target = FrozenTarget(model, settings.layer_ids)
    norms = [module for module in target.base.children() if "norm" in type(module).__name__.lower()]
    if len(norms) != 1:
        raise ValueError(
            f"target {type(model).__name__} has {len(norms)} norms beside its layers: target.server needs one"
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    embeddings, head, norm = model.get_input_embeddings().weight, target.head.weight, norms[0]
    inside = {name: names[id(parameter)] for name, parameter in norm.named_parameters()}
    found = read_tensors(Path(settings.path), {names[id(embeddings)], names[id(head)], *inside.values()})
    norm.to_empty(device="cpu").load_state_dict({name: found[full] for name, full in inside.items()})
    return found[names[id(head)]].to(dtype), found[names[id(embeddings)]].to(dtype), norm.eval().requires_grad_(False)
