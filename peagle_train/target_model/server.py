"""A target behind vLLM servers, which compute its hidden states; and the command that starts such a server.

Every document is a request of its own, up to the last position that training reads (`positions_read`), so packed documents
cannot see each other. vLLM answers with the name of a file in a folder that it shares with us (the one that
`peagle-train serve-target` gives it); the file is locked until it is whole, and removed once it is read.

B: sequences of a batch, L: positions, n: tokens of a document, k: feature layers, T: the target's hidden size.
"""

import fcntl
import itertools
import json
import logging
import math
import os
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from peagle_train.config import Recipe, Target
from peagle_train.core.elements import positions_read
from peagle_train.core.passes import TargetOutputs
from peagle_train.data.vocab import load_config
from peagle_train.files import RunStopped, one_line
from peagle_train.target_model.frozen import AbsentTarget, TargetLost, pieces_of
from peagle_train.target_model.loading import default_layer_ids

logger = logging.getLogger(__name__)

REQUESTS = 32  # in flight at a time, to each server
REMEDY = "start the server with the command that `peagle-train serve-target RECIPE` prints"
ON_CPU = "cpu"
"""In the path of what a server on a CPU writes; while it does, vLLM draws wrong tokens there at temperatures above 0."""


def connect(url: str, option: str, key: str = "none", **how: Any) -> tuple[Any, Any]:
    """The package openai, and its client of a server. ValueError without the package."""
    try:
        import openai
    except ImportError:
        raise ValueError(f"{option} takes the package openai, which is missing: pip install openai") from None
    return openai, openai.OpenAI(base_url=url, api_key=key, **how)


class ServedTarget(AbsentTarget):
    """A target that asks `target.server` for what training reads: for a `device`, in sequences of at most `max_length`.
    ValueError: one line, for a server that is none, or that serves another model or other layers.
    """

    def __init__(self, settings: Target, device: torch.device, max_length: int) -> None:
        assert settings.server
        urls = [settings.server] if isinstance(settings.server, str) else settings.server
        super().__init__(settings, device, REQUESTS * len(urls))
        self.patience = max(60.0, settings.server_patience)  # seconds that a request or its file may take
        self.servers = [_Server(url, self.patience) for url in urls]
        if (longest := min(server.max_model_len for server in self.servers)) <= max_length:
            raise ValueError(f"target.server takes {longest} tokens; data.max_length + 1 is {max_length + 1}: {REMEDY}")
        self._turns = itertools.cycle(self.servers)
        self._stopping = threading.Event()
        states = self._ask(torch.arange(1, 6))[0]
        self.read_around(states.dtype)
        if settings.dtype not in ("auto", dtype := str(states.dtype)[6:]):
            raise ValueError(f"target.server computes in {dtype}, target.dtype is {settings.dtype}: {REMEDY}")
        self._token_bytes = (len(self.layer_ids) + 1) * self.hidden_size * self.dtype.itemsize
        self.ahead = int(settings.prefetch_gib * 2**30) // (max_length * self._token_bytes)
        self._norm = self.final_norm().to(device)
        if settings.check:
            self.check()

    def check(self) -> None:
        """ValueError unless the greedy token after a few prompts is the head's of the last hidden state here."""
        for start, _ in itertools.product((1, 100, 1000), self.servers):  # which take turns
            ids = torch.arange(start, start + 7) % self.vocab_size
            states, token = self._ask(ids)
            logits = self.head_weight().float() @ self._norm(states[-1, -1].to(self.device)).float().cpu()
            off = float(logits.max() - logits[token]) if token < self.vocab_size else math.inf
            if off > 0.02 * float(logits.abs().max()):  # bfloat16 has near ties
                tokens = f"token {token}, target.path {self.settings.path} with {int(logits.argmax())}"
                raise ValueError(f"target.server answers {ids.tolist()} with {tokens}: another model: {REMEDY}")

    def expect(self, batches: Sequence[dict[str, Tensor]]) -> None:
        for batch in batches:
            size = batch["input_ids"].numel() * self._token_bytes  # as that of each that is on its way
            if self.coming and (len(self.coming) + 1) * size > self.settings.prefetch_gib * 2**30:
                return
            self.begin(batch)

    def fetch(self, batch: dict[str, Tensor], room: list[Tensor]) -> list[AsyncResult[None]]:
        documents_BL = batch["document_ids"]
        learned = (batch["supervised"] & (batch["depth"] == 0)).long()
        is_supervised = torch.zeros_like(documents_BL).scatter_add_(1, batch["anchor"], learned) > 0
        is_needed = torch.stack(positions_read(is_supervised, documents_BL, self.reach)).any(0)
        parts = []
        for b, documents in enumerate(documents_BL):
            for part in pieces_of(documents[documents >= 0]):
                if (needed := is_needed[b, part].nonzero()[:, 0]).numel():
                    ids = batch["input_ids"][b, part][: int(needed[-1]) + 1]
                    parts.append(self.threads.apply_async(self._read, (ids, needed, [each[b, part] for each in room])))
        return parts

    def outputs(self, batch: dict[str, Tensor], head_rows: Tensor) -> TargetOutputs:
        try:
            found = super().outputs(batch, head_rows)
        except ValueError as error:  # restarted with another model: what was learned is saved, as where it is lost
            raise TargetLost(str(error)) from None
        return replace(found, last_hidden=self._norm(found.last_hidden))

    def _read(self, ids_n: Tensor, needed: Tensor, room: list[Tensor]) -> None:
        states = self._ask(ids_n)[0][needed]
        room[0][needed], room[1][needed] = states[:, :-1].flatten(1), states[:, -1]

    def _ask(self, ids_n: Tensor) -> tuple[Tensor, int]:
        """The hidden states [n, k + 1, T] of a document, and the greedy token after it; the last ones before the norm.
        TargetLost: no server answered for `target.server_patience` seconds. ValueError: one answered something else.
        """
        until = None
        while True:
            server = next(self._turns)
            try:
                return self._ask_once(server, ids_n.tolist())
            except OSError as error:
                failure = f"target.server {server.url} gave no answer: {one_line(error)}"
            if until is None:
                until = time.monotonic() + self.settings.server_patience
                logger.warning("%s; asking again", failure)
            elif time.monotonic() > until:
                self._stopping.set()  # the other requests' threads need not try as long
            if self._stopping.wait(min(2.0, self.settings.server_patience)):
                raise TargetLost(failure)

    def _ask_once(self, server: "_Server", ids: list[int]) -> tuple[Tensor, int]:
        """See `_ask`; OSError where the server gives no answer."""
        # Greedy, said in full: what is missing, servers take from the target's generation_config.json.
        greedy = {"temperature": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "max_tokens": 1}
        more = {"return_token_ids": True, "add_special_tokens": False, "repetition_penalty": 1.0}
        try:
            reply = server.client.completions.create(model=server.model, prompt=ids, **greedy, extra_body=more)
        except server.openai.OpenAIError as error:
            code = getattr(error, "status_code", 500)
            if code < 500 and code not in (408, 429):  # 408: a proxy before it
                raise ValueError(f"target.server {server.url} refuses {len(ids)} tokens: {one_line(error)}") from None
            raise OSError(one_line(error)) from None
        path = states_path(reply)
        if path is None:
            raise ValueError(f"target.server {server.url} gives no hidden states: {REMEDY}")
        states = take(path, ids, self.patience)
        given = f"{path.parent.name} {[*states.shape]}"
        asked = f"{layers_folder(self.layer_ids)} {[len(ids), len(self.layer_ids) + 1, self.hidden_size]}"
        if given != asked:
            raise ValueError(f"target.server {server.url} gives {given}, the recipe asks for {asked}: {REMEDY}")
        return states, reply.choices[0].token_ids[0]


class _Server:
    """A client of a vLLM server, and which model that serves."""

    def __init__(self, url: str, patience: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.openai, self.client = connect(f"{self.url}/v1", "target.server", max_retries=0, timeout=patience)
        try:
            [model, *_] = self.client.models.list().data
        except (self.openai.OpenAIError, ValueError) as error:
            raise ValueError(f"target.server {url} does not answer: {one_line(error)}; {REMEDY}") from None
        self.model, self.max_model_len = model.id, int(getattr(model, "max_model_len", 0))


def layers_folder(layer_ids: Sequence[int]) -> str:
    """The name of the folder into which a server writes, which says what it writes."""
    return f"layers-{'-'.join(map(str, layer_ids))}"


def states_path(reply: Any) -> Path | None:
    """The file of hidden states that a server's reply names; None if it names none."""
    path = (getattr(reply, "kv_transfer_params", None) or {}).get("hidden_states_path")
    return Path(path) if path else None


def take(path: Path, ids: list[int], patience: float) -> Tensor:
    """Read and remove a server's file of hidden states, [n, k + 1, T], once its lock is free. OSError: it is not whole
    after `patience` seconds, or never will be, or has no lock: the folder is not shared, or was emptied by a restart.
    """
    lock, until, pause = path.with_name(path.name + ".lock"), time.monotonic() + patience, 0.001
    with lock.open() as held:
        while True:
            try:
                fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)  # polled: a blocking one has no limit
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise OSError(f"{path} was not whole after {patience:.0f} s") from None
            time.sleep(pause)
            pause = min(0.1, 2 * pause)
        try:
            tensors = load_file(path)
        except (FileNotFoundError, SafetensorError) as error:
            raise OSError(f"it ended while it wrote {path}") from error
    lock.unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    if tensors["token_ids"].tolist() != ids:
        raise ValueError(f"the server wrote {path} for other tokens than it was asked for")
    return tensors["hidden_states"]


# Starting a server


def serve_command(recipe: Recipe, port: int, folder: str, python: str, more: Sequence[str] = ()) -> list[str]:
    """The words of the command that starts a vLLM server which gives a recipe's features.

    folder: that server and training share, in memory or on a fast disk. python: that of vLLM's environment.
    more: arguments for vLLM, as --tensor-parallel-size 8.
    """
    target = recipe.target
    config = load_config(target.path, target.trust_remote_code).get_text_config()
    layers = target.layer_ids or default_layer_ids(config.num_hidden_layers)
    if on_cpu := not torch.cuda.is_available():
        logger.warning("there is no GPU here, so the command is for a CPU: print it where the server will run")
    # The last one: what enters the final norm.
    ids = {"eagle_aux_hidden_state_layer_ids": [*layers, config.num_hidden_layers]}
    extract = {"method": "extract_hidden_states", "num_speculative_tokens": 1}
    speculative = {**extract, "draft_model_config": {"hf_config": ids}}
    connector, own = {"kv_connector": "ExampleHiddenStatesConnector"}, _storage(folder, port)
    if on_cpu:
        module, own = "peagle_train.serving.vllm_connector", own / ON_CPU
        connector = {"kv_connector": "CPUHiddenStatesConnector", "kv_connector_module_path": module}
    storage = {"shared_storage_path": str(own / layers_folder(layers))}
    transfer = {**connector, "kv_role": "kv_producer", "kv_connector_extra_config": storage}
    return [
        *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", target.path, "--port", str(port)),
        *("--max-model-len", str(recipe.data.max_length + 1)),  # a prompt and the one token that has to be asked for
        *([] if target.dtype == "auto" else ["--dtype", target.dtype]),
        *(["--trust-remote-code"] if target.trust_remote_code else []),
        *(["--enforce-eager"] if on_cpu else []),
        *("--speculative_config", json.dumps(speculative), "--kv_transfer_config", json.dumps(transfer)),
        *more,
    ]


def _storage(folder: str, port: int) -> Path:
    """A server's own part of the shared folder."""
    return Path(folder).absolute() / f"port-{port}"


def run_server(command: list[str], port: int, folder: str) -> None:
    """Empty the server's part of `folder`, run it until it ends, and say when it answers. RunStopped if it fails."""
    if _answers(port):
        raise ValueError(f"a server answers at port {port} already: stop it, or give another --port")
    shutil.rmtree(_storage(folder, port), ignore_errors=True)  # what a killed server or its readers have left
    # GiB; by default vLLM on a CPU takes nearly all memory for keys and values.
    defaults = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "4"}
    with subprocess.Popen(command, env={**defaults, **os.environ}) as server:
        try:
            while server.poll() is None and not _answers(port):
                time.sleep(1)
            if server.poll() is None:
                logger.warning("the server answers: train with target.server=http://localhost:%d", port)
            server.wait()
        finally:
            server.terminate()  # if this command was interrupted
    if server.returncode:
        raise RunStopped(f"vLLM ended with exit code {server.returncode}: see its messages above")


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5):
            return True
    except OSError:  # urllib's errors are of this type
        return False
