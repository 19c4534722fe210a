"""Answers as a vLLM server that gives hidden states: a file, locked until it is whole, in a folder that says its layers."""

import json
import threading
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from peagle_train.target_model.frozen import FrozenTarget
from tests.chat_fake import Reply
from tests.tiny_chat import END, make_tokenizer


class States:
    """`respond` of a `FakeServer`, in the target's own numbers, in float64.

    `faults`: what goes wrong with the next requests, in order: down, busy, timeout, gone (404), no lock, other ids, a layer
    less.
    """

    def __init__(self, target: Path, folder: Path, name: str = "layers-2-3-4") -> None:
        self.frozen, self.folder = FrozenTarget.load(str(target), dtype="float64"), folder / name
        self.folder.mkdir(parents=True)
        self.prompts: list[list[int]] = []
        self.faults: list[str] = []
        self.down = False
        self._numbers, self._turn = count(), threading.Lock()

    def __call__(self, body: dict[str, Any]) -> Reply:
        with self._turn:
            if "messages" in body:
                return self.chat(body["messages"])
            ids = body["prompt"]
            self.prompts.append(ids)
            fault = self.faults.pop(0) if self.faults else "down" if self.down else ""
            if status := {"down": 500, "busy": 429, "timeout": 408, "gone": 404}.get(fault):
                return status, b"{}"
            path = self.folder / f"{next(self._numbers)}.safetensors"
            if fault != "no lock":
                token = self.write(path, ids[::-1] if fault == "other ids" else ids, int(fault == "a layer less"))
            choice = {"text": "", "finish_reason": "length", "token_ids": [token] if not fault else [0]}
            answer = {"choices": [choice], "kv_transfer_params": {"hidden_states_path": str(path)}}
            return 200, json.dumps(answer).encode()

    def chat(self, messages: list[dict[str, str]]) -> Reply:
        """Answers with words that depend on the question; one that has w9 is cut."""
        ids = make_tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        answer, path = [11, len(ids), 12, END], self.folder / f"{next(self._numbers)}.safetensors"
        self.write(path, [*ids, *answer[:-1]])
        message = {"role": "assistant", "content": f"w11 w{len(ids)} w12"}
        choice = {"message": message, "finish_reason": "length" if 9 in ids else "stop", "token_ids": answer}
        kept = {"prompt_token_ids": ids, "kv_transfer_params": {"hidden_states_path": str(path)}}
        return 200, json.dumps({"choices": [choice], **kept}).encode()

    def write(self, path: Path, ids: list[int], first: int = 0) -> int:
        states, token = self.states(torch.tensor(ids))
        save_file({"hidden_states": states[:, first:].contiguous(), "token_ids": torch.tensor(ids)}, path)
        path.with_name(path.name + ".lock").touch()
        return token

    def states(self, ids_n: Tensor) -> tuple[Tensor, int]:
        before: list[Tensor] = []
        hook = self.frozen.final_norm().register_forward_pre_hook(lambda _, arguments: before.append(arguments[0]))
        features, last = self.frozen.features(ids_n[None], torch.arange(ids_n.numel())[None])
        hook.remove()
        states = torch.cat([features[0].unflatten(1, (3, -1)), before[-1].transpose(0, 1)], 1)
        return states, int((self.frozen.head_weight() @ last[0, -1]).argmax())
