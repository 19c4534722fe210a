"""A connector for vLLM on a CPU that writes each request's hidden states, as vLLM's own does on a GPU.

Loaded by vLLM (`kv_connector_module_path`), in its process; nothing of this project imports it.
"""

from functools import partial

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    PendingSave,
    extract_from_kv_cache,
)


class CPUHiddenStatesConnector(ExampleHiddenStatesConnector):
    """vLLM's connector without the page-locked memory and the streams that a CPU does not have."""

    def _submit_async_write(self, pending: PendingSave) -> None:
        if not self._is_tp_rank_zero:
            return
        assert self._kv_cache is not None
        blocks = torch.tensor(pending.block_ids)[:, None] * self._block_size
        slots = (blocks + torch.arange(self._block_size)).flatten()
        states = extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids)).contiguous()
        lock = self._lock_fds.pop(pending.req_id)  # held since the request came; closed when the file is whole
        tensors = {"hidden_states": states, "token_ids": pending.token_ids.clone()}
        copied = torch.cpu.Event()  # which has always happened
        future = self._executor.submit(self._write_tensors, tensors, copied, pending.filename, lock)
        self._req_copy_events[pending.req_id] = copied
        self._req_futures[pending.req_id] = future
        future.add_done_callback(partial(self._on_write_done, pending.req_id))
