"""`peagle-train serve-target`: the command that starts a vLLM server which gives a recipe's features."""

import json
import logging
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import torch

from peagle_train.config import Recipe
from peagle_train.data.vocab import load_config
from peagle_train.files import RunStopped
from peagle_train.target_model.loading import default_layer_ids
from peagle_train.target_model.server import layers_name

logger = logging.getLogger(__name__)


def serve_command(recipe: Recipe, port: int, folder: str, python: str, more: Sequence[str] = ()) -> list[str]:
    """The command's words.

    Args:
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
    speculative = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": ids},
    }
    connector = {"kv_connector": "ExampleHiddenStatesConnector"}
    if on_cpu:
        module = "peagle_train.serving.vllm_connector"
        connector = {"kv_connector": "CPUHiddenStatesConnector", "kv_connector_module_path": module}
    storage = {"shared_storage_path": str(_storage(folder, port) / f"layers-{layers_name(layers)}")}
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
    """Run the server until it ends, saying when it answers. RunStopped if it fails. `folder` is emptied before."""
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
        except BaseException:
            server.terminate()
            raise
    if server.returncode:
        raise RunStopped(f"vLLM ended with exit code {server.returncode}: see its messages above")


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5):
            return True
    except (OSError, urllib.error.URLError):
        return False
