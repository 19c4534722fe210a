"""The frozen target: what training reads of one, and a transformers causal LM that computes it.

Only the base model runs, so no logits of the whole vocabulary exist; hooks keep the inputs of some layers, so no other
hidden state outlives its layer. B: sequences, L: positions, T: hidden size, F: feature layers, V: draft vocabulary.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import accumulate
from multiprocessing.pool import AsyncResult, ThreadPool  # its threads are daemons: no exit waits for an answer
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from peagle_train.config import Target
from peagle_train.core.passes import TargetOutputs
from peagle_train.data.packing import TrainingData
from peagle_train.data.vocab import eos_token_ids
from peagle_train.distributed import counts_over_ranks, shard, whole
from peagle_train.files import RunStopped
from peagle_train.target_model import loading, packed
from peagle_train.target_model.packed import Way

logger = logging.getLogger(__name__)
FP8 = "float8_e4m3fn"
PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def pieces_of(document_ids: Tensor) -> list[slice]:
    """Positions of each piece of a sequence without padding, in order."""
    counts = document_ids.unique_consecutive(return_counts=True)[1].tolist()
    return [slice(end - count, end) for end, count in zip(accumulate(counts), counts)]


class TargetLost(RunStopped):
    """Nothing answers for the target any more."""


class TargetBase(ABC):
    """What training reads of a target: a `FrozenTarget`, which computes it, a `StoredTarget`, a `ServedTarget`.

    model: any transformers causal LM with a stack of decoder layers; the body may be quantised, the head not.
    layer_ids: the layers whose *input* is a feature, ascending; None is `default_layer_ids`.

    ValueError: its labels or features would be wrong (see `refuse_unfit`).
    """

    reach: int | None = None
    """The drafter's, see `positions_read`: what else is needed of a target that is elsewhere than in this process."""
    ahead = 0  # sequences that it wants to know of before their outputs are asked for
    waited = 0.0  # seconds that `outputs` has waited for what comes from elsewhere

    def __init__(self, model: Any, layer_ids: Sequence[int] | None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config = model.config.get_text_config()
        name = type(model).__name__
        loading.refuse_unfit(self.config)
        self.head: Any = model.get_output_embeddings()
        if self.head is None or getattr(self.head, "bias", None) is not None:
            raise ValueError(f"target {name} has no head (it is no causal LM), or one with a bias: unsupported")
        for module in (model.get_input_embeddings(), self.head):
            weight: Any = getattr(module, "weight", None)
            # Other numbers, or a tensor of another class, need a quantiser's code to mean anything.
            if type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in PLAIN:
                raise ValueError(f"target {name} has a quantised head or embeddings: leave both unquantised")
        self.vocab_size, self.dtype = self.head.weight.shape[0], self.head.weight.dtype
        self.hidden_size: int = self.config.hidden_size
        self.base, n = model.get_decoder(), self.config.num_hidden_layers
        stacks = [m for m in self.base.modules() if isinstance(m, nn.ModuleList) and len(m) == n]
        if not stacks or self.base is model:
            raise ValueError(f"target {name}: no stack of {n} decoder layers found below a head")
        self.layers: Any = stacks[0]
        self.layer_ids = list(loading.default_layer_ids(len(self.layers)) if layer_ids is None else layer_ids)
        if not self.layer_ids or self.layer_ids != sorted({*self.layer_ids} & {*range(len(self.layers))}):
            raise ValueError(f"target.layer_ids is {self.layer_ids}; give distinct ids of 0..{n - 1}, ascending")

    def eos_token_ids(self) -> list[int]:
        """Tokens that end the target's answers by its config and its generation config, ascending."""
        return eos_token_ids(self.config, getattr(self.model, "generation_config", None))

    def embedding_rows(self) -> Tensor:
        """[vocabulary, T], the input embeddings. Every rank must call it where the target is sharded."""
        return whole(self.model.get_input_embeddings().weight.detach())

    def head_weight(self) -> Tensor:
        """[vocabulary, T]; may lie on the CPU."""
        return self.head.weight.detach()

    def head_rows(self, token_ids: Tensor) -> Tensor:
        """[V, T], the head's rows of the given tokens."""
        weight = self.head_weight()
        return weight[token_ids.to(weight.device)]

    def final_norm(self) -> nn.Module:
        """The norm whose output the last hidden states are; ValueError if none is found."""
        norms = [module for module in self.base.children() if "norm" in type(module).__name__.lower()]
        if len(norms) != 1:
            raise ValueError(f"target {type(self.model).__name__} has {len(norms)} norms beside its layers, not one")
        return norms[0]

    @abstractmethod
    def outputs(self, batch: dict[str, Tensor], head_rows: Tensor) -> TargetOutputs:
        """Features, and last hidden states after the final norm, of a collator's batch on the host (on a device it costs a
        wait), on the device of `head_rows`; where no supervised element reads them (`positions_read`), perhaps zeros.
        """

    def expect(self, batches: Sequence[dict[str, Tensor]]) -> None:
        """`outputs` will be asked for these very batches soon, in this order: begin to read what they need, if anything."""

    def close(self) -> None:
        """Stop background work. Nothing is asked of the target after this."""

    def check_rows(self, data: TrainingData) -> None:
        """ValueError if there are sequences whose outputs the target cannot give."""

    def cache_dtype(self, asked: str) -> torch.dtype:
        """What features from the disk have, but for the scaled ones of FP8. `asked`: target.cache_dtype."""
        return self.dtype if asked in ("auto", FP8) else getattr(torch, asked)


class FrozenTarget(TargetBase):
    """A target that computes what is asked of it, at most `chunk_tokens` tokens at a time; None: whole batches."""

    def __init__(self, model: Any, layer_ids: Sequence[int] | None = None, chunk_tokens: int | None = None) -> None:
        super().__init__(model, layer_ids)
        self.way = Way(not packed.takes_bounds(model, self.config), chunk_tokens)
        """How batches are given to the model; `check` may change it."""
        self.sharded = False

    @classmethod
    def load(
        cls,
        path: str,
        *,
        dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto",
        device: torch.device | None = None,
        layer_ids: Sequence[int] | None = None,
        chunk_tokens: int | None = None,
        shard: bool = False,
        **how: Any,
    ) -> "FrozenTarget":
        """Load a Hugging Face folder; ValueError, one line, for a folder that is none. `how`: for `loading.load_model`.
        shard: over all ranks, by FSDP2; `world_mesh` must have been called before. From then on every rank must call
        `features` and `embedding_rows` as often as the others.
        """
        device = device or torch.device("cpu")
        model: Any = loading.load_model(path, loading.resolve_dtype(dtype, device), **how)
        # A sharded one moves to the device a layer at a time.
        target = cls(model if shard or "where" in how else model.to(device), layer_ids, chunk_tokens)
        if target.way.apart and "where" not in how:  # else it does not run
            logger.warning("target %s knows no packed documents: it is given one at a time", type(model).__name__)
        if shard:
            target._shard(device)
        return target

    @classmethod
    def from_recipe(cls, target: Target, device: torch.device, shard: bool = False, **changes: Any) -> "FrozenTarget":
        """`load`, as a recipe's section says but for `changes`; what its cache holds is not looked at."""
        names = "dtype", "layer_ids", "chunk_tokens", "attn_implementation", "trust_remote_code"
        given = {name: getattr(target, name) for name in names} | changes
        return cls.load(target.path, device=device, shard=shard, **given)

    def _shard(self, device: torch.device) -> None:
        """All but the head, which stays whole and on the CPU."""
        if not all(parameter.is_floating_point() for parameter in self.model.parameters()):
            raise ValueError(f"target.shard is true, but target {type(self.model).__name__} is quantised: unsupported")
        self.sharded = True
        if self.head.weight is self.model.get_input_embeddings().weight:
            self.head.weight = nn.Parameter(self.head.weight.detach().clone(), requires_grad=False)
        shard(self.base, self.layers, device)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return torch.device("cpu") if device.type == "meta" else device  # its weights lie on the disk

    @contextmanager
    def layer_inputs(self, keep: Callable[[int, Tensor], object]) -> Iterator[None]:
        """In the block, `keep` is called with what enters each feature layer, and its place among them."""

        def hook(slot: int) -> Any:
            return lambda _, args, kwargs: keep(slot, args[0] if args else kwargs["hidden_states"])

        with ExitStack() as hooks:
            for slot, layer in enumerate(self.layer_ids):
                hooks.enter_context(self.layers[layer].register_forward_pre_hook(hook(slot), with_kwargs=True))
            yield

    @torch.no_grad()
    def features(self, input_ids: Tensor, position_ids: Tensor, way: Way | None = None) -> tuple[Tensor, Tensor]:
        """Features [B, L, F*T] and last hidden states after the final norm [B, L, T], in the target's dtype. Packed
        documents do not see each other (`way`: None is `self.way`); those of one token, as padding, may get zeros.

        input_ids: int64 [B, L], unshifted. position_ids: int64 [B, L], restarting at 0 with every document. On the host,
            where bounds are found, or on the target's device, which costs a wait.
        """
        way = way or self.way
        B, L = input_ids.shape
        T, F = self.hidden_size, len(self.layer_ids)
        bounds = packed.document_bounds(position_ids.cpu())
        runs = packed.plan_runs(bounds, way)
        idle = 0
        if self.sharded and (way.apart or way.chunk_tokens is not None):  # else each rank has one forward
            num_forwards = sum(map(len, runs))
            idle = int(counts_over_ranks([num_forwards], self.device, largest=True)) - num_forwards
        ids_1N, positions_1N = (t.to(self.device, non_blocking=True).reshape(1, -1) for t in (input_ids, position_ids))
        made: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        features_1NF, last_1NT = torch.zeros(1, B * L, F * T, **made), torch.zeros(1, B * L, T, **made)
        span = slice(0, 1)  # of the tokens that the model has now

        def keep(slot: int, hidden: Tensor) -> None:
            features_1NF[:, span, slot * T : (slot + 1) * T] = hidden

        def forward(span: slice, **given: Any) -> Tensor:
            ids = {"input_ids": ids_1N[:, span], "position_ids": positions_1N[:, span]}
            return self.base(**ids, attention_mask=None, **given).last_hidden_state

        with nullcontext() if way.apart else packed.bounds_heeded(self.config), self.layer_inputs(keep):
            for run in runs:
                cache = {packed.cache_argument(self.base): DynamicCache(config=self.config)} if len(run) > 1 else {}
                for span in run:
                    told = {} if way.apart else packed.bounds_arguments(bounds, span, self.device)
                    last_1NT[:, span] = forward(span, use_cache=bool(cache), **cache, **told)
        for _ in range(idle):
            forward(slice(0, 1), use_cache=False)
        return features_1NF.view(B, L, F * T), last_1NT.view(B, L, T)

    def outputs(self, batch: dict[str, Tensor], head_rows: Tensor) -> TargetOutputs:
        return TargetOutputs(*self.features(batch["input_ids"], batch["position_ids"]), head_rows)

    @torch.no_grad()
    def check(self) -> None:
        """Run a few tokens and see that features are what training takes them for (`packed.choose_way`) and that nothing
        but the head comes between last hidden states and logits, which labels are made of; ValueError if not.
        """
        name = type(self.model).__name__
        self.way = packed.choose_way(name, self.features, self.way, self.vocab_size)
        ids, positions = torch.arange(1, 7)[None] % self.vocab_size, torch.arange(6)[None]
        _, last = self.features(ids, positions, Way(apart=True))
        self.model.set_output_embeddings(nn.Identity())
        try:
            given = {"input_ids": ids.to(self.device), "position_ids": positions.to(self.device), "use_cache": False}
            off = packed.relative(self.model(**given).logits.to(last.device), last)
        finally:
            self.model.set_output_embeddings(self.head)
        if off > packed.TOLERANCE:
            raise ValueError(f"target {name} changes its logits beside the head ({off:.0%}): labels would be wrong")


class AbsentTarget(TargetBase):
    """A target whose layers run elsewhere: its outputs are fetched by threads, ahead of time, and what lies around its
    layers is read from its .safetensors files, on the CPU. Subclasses call `read_around` when they know its dtype.
    """

    def __init__(self, settings: Target, device: torch.device, num_threads: int) -> None:
        super().__init__(
            loading.load_model(settings.path, torch.float32, None, settings.trust_remote_code, "meta"),
            settings.layer_ids,
        )
        self.settings, self.device = settings, device
        self.threads = ThreadPool(num_threads)
        # By the batch's id: the batch, room for its features [B, L, F*T] and last hidden states [B, L, T], what fills it.
        self.coming: dict[int, tuple[dict[str, Tensor], list[Tensor], list[AsyncResult[None]]]] = {}

    def read_around(self, dtype: torch.dtype) -> None:
        """Read head and final norm, in the target's dtype."""
        self.dtype = dtype
        for module in (self.head, self.final_norm()):
            module.load_state_dict(self._stored(module), assign=True)

    @abstractmethod
    def fetch(self, batch: dict[str, Tensor], room: list[Tensor]) -> list[AsyncResult[None]]:
        """Have the threads fill `room`, zeros, with a batch's outputs."""

    def begin(self, batch: dict[str, Tensor]) -> None:
        """`fetch` a batch, unless that was begun before."""
        if id(batch) not in self.coming:
            # Allocated here: page-locked memory belongs to the device of the thread that asks for it.
            how: dict[str, Any] = {"dtype": self.cache_dtype("auto"), "pin_memory": self.device.type == "cuda"}
            widths = len(self.layer_ids) * self.hidden_size, self.hidden_size
            room = [torch.zeros(*batch["input_ids"].shape, width, **how) for width in widths]
            self.coming[id(batch)] = batch, room, self.fetch(batch, room)

    def outputs(self, batch: dict[str, Tensor], head_rows: Tensor) -> TargetOutputs:
        self.begin(batch)
        started = time.perf_counter()
        _, room, parts = self.coming.pop(id(batch))
        for part in parts:
            part.get()
        self.waited += time.perf_counter() - started
        features, last_hidden = (each.to(head_rows.device, head_rows.dtype, non_blocking=True) for each in room)
        return TargetOutputs(features, last_hidden, head_rows)

    def close(self) -> None:
        self.threads.terminate()

    def _stored(self, module: Any) -> dict[str, Tensor]:
        """The parameters of a module of the model, by their names in it."""
        full = {id(parameter): name for name, parameter in self.model.named_parameters()}
        names = {name: full[id(parameter)] for name, parameter in module.named_parameters()}
        found = loading.read_tensors(Path(self.settings.path), set(names.values()))
        return {name: found[key].to(self.dtype) for name, key in names.items()}

    def embedding_rows(self) -> Tensor:
        return self._stored(self.model.get_input_embeddings())["weight"]
