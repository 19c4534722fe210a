"""The frozen target: a transformers causal LM that gives features, last hidden states and its head's rows.

Only the base model runs, so no logits of the whole vocabulary exist; hooks keep the inputs of three layers, so no other
hidden state outlives its layer. B: rows, L: columns, T: hidden size, V: draft vocabulary.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from peagle_train.core.rope import ROPE_TYPES
from peagle_train.core.segments import TargetOutputs
from peagle_train.data import vocab
from peagle_train.distributed import max_counts, shard, whole
from peagle_train.files import one_line
from peagle_train.target_model.attention import bounds_heeded, takes_bounds
from peagle_train.target_model.check import check_target
from peagle_train.target_model.chunks import Run, check_chunkable, document_bounds, forward_run, plan_runs

# ---- base
# What training needs of a target, whether its outputs are computed (`FrozenTarget`) or read (`CachedTarget`).
#
# V: draft vocabulary, T: the target's hidden size.


class TargetBase(ABC):
    """A target that is only ever read."""

    config: Any
    """transformers' config of its text model."""
    layer_ids: list[int]
    """The three layers whose *input* is a feature, ascending."""

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @abstractmethod
    def eos_token_ids(self) -> list[int]:
        """Tokens that end the target's answers, ascending."""

    @abstractmethod
    def embedding_rows(self) -> Tensor:
        """[vocabulary, T], the input embeddings. Every rank must call it where the target is sharded."""

    @abstractmethod
    def head_weight(self) -> Tensor:
        """[vocabulary, T], in the target's dtype; may lie on the CPU."""

    def head_rows(self, token_ids: Tensor) -> Tensor:
        """[V, T], the head's rows of the given tokens."""
        weight = self.head_weight()
        return weight[token_ids.to(weight.device)]

    def expect(self, batch: dict[str, Tensor]) -> None:
        """`outputs` will be asked for this very batch soon: begin to read what it needs, if anything is read."""
        return

    @abstractmethod
    def outputs(self, batch: dict[str, Tensor], head_rows: Tensor) -> TargetOutputs:
        """What a step needs of the target for a collator's batch, on the device of `head_rows`.

        Args:
            batch: on the host; on a device it costs a wait.
        """

    @abstractmethod
    def check(self) -> None:
        """ValueError where features or labels are not what training takes them for."""


def default_layer_ids(num_layers: int) -> list[int]:
    """(2, n // 2, n - 3), vLLM's default; (2, 3, 4) at n = 6, where that names a layer twice and vLLM would read only two
    features. ValueError below.
    """
    if num_layers < 6:
        raise ValueError(
            f"the target has {num_layers} layers, too few for the default feature layers (2, n // 2, n - 3): give"
            " target.layer_ids, three ascending ids"
        )
    return [2, num_layers // 2, max(num_layers - 3, num_layers // 2 + 1)]


# ---- loading
# Loading a target's folder: what would give wrong features or labels is refused before any weight is read.

logger = logging.getLogger(__name__)

UNPACKABLE = ("mamba", "rwkv", "recurrent", "linear_attention", "ssm", "conv", "retention", "xlstm")
"""Words in a config's model or layer types that mean a state runs across document boundaries."""

LOGIT_CHANGES = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)
"""Config fields by which an architecture changes its logits after the head: labels would be wrong."""

_REPORTS = ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """A torch dtype, or "auto" (the checkpoint's own). On CPU, auto is bfloat16 where the processor multiplies in it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cpu":
        return "auto"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def load_model(
    path: str,
    dtype: torch.dtype | str,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | None = None,
) -> nn.Module:
    """The causal LM of a Hugging Face folder, on the CPU or as the device map says.

    Raises:
        ValueError: one line, for a folder that is none, a model that is unfit, weights that are not its config's.
    """
    _check_folder(path)
    if trust_remote_code:
        logger.warning("target.trust_remote_code is on: Python code in %s will run", path)
    kwargs: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(path, **kwargs)
        refuse_unfit(config.get_text_config())
        _check_size(path, config, trust_remote_code)
        if attn_implementation:
            kwargs["attn_implementation"] = attn_implementation
        if device_map:
            kwargs["device_map"] = device_map
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, use_safetensors=True, **kwargs
        )
    except Exception as error:  # whatever a foreign or corrupt file makes the loaders raise
        raise ValueError(
            f"target.path {path} cannot be loaded: {type(error).__name__}: {one_line(error, 300)}"
        ) from error
    model, report = loaded
    bad = [f"{len(report[kind])} {kind.replace('_', ' ')}" for kind in _REPORTS if report.get(kind)]
    if bad:
        raise ValueError(
            f"target.path {path}: its weights do not fit its config ({', '.join(bad)}): wrong or cut files"
        )
    return model


def refuse_unfit(config: Any) -> None:
    """ValueError for targets whose features or labels this project would get wrong."""
    name = getattr(config, "model_type", "?")
    for field in LOGIT_CHANGES:
        value = getattr(config, field, None)
        if value is not None and value != 1.0:
            raise ValueError(f"target {name} has {field} = {value}: it changes logits after the head, unsupported")
    kinds = " ".join([name, *map(str, getattr(config, "layer_types", None) or [])]).lower()
    found = [word for word in UNPACKABLE if word in kinds]
    if found:
        raise ValueError(f"target {name} has {found[0]} layers, whose state runs across packed documents: unsupported")
    rope = getattr(config, "rope_parameters", None) or {}
    tables = [rope] if "rope_type" in rope else [t for t in rope.values() if isinstance(t, dict)]
    for table in tables:
        if table.get("rope_type", "default") in ("dynamic", "longrope"):
            raise ValueError(
                f"target {name} has rope type {table['rope_type']!r}, whose tables depend on the length of a call, so"
                f" packed and padded rows would differ from serving; supported: {', '.join(ROPE_TYPES)}"
            )


def _check_folder(path: str) -> None:
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(
            f"target.path {path} is no folder; give a Hugging Face model folder on this machine (a model of the hub has to"
            " be downloaded first)"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"target.path {path} has no config.json; give a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"target.path {path} has no .safetensors weights; convert them first")


def _check_size(path: str, config: Any, trust_remote_code: bool) -> None:
    """ValueError where a config describes a far larger model than the weights hold.

    A config.json that lacks its sizes would become billions of random parameters, which no memory holds.
    """
    if getattr(config, "quantization_config", None) is not None:
        return  # its weights are packed
    held = 0
    for file in Path(path).glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            held += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    described = sum(p.numel() for p in model.parameters())
    if described > 2 * held:
        raise ValueError(f"its config describes {described:,} parameters, but its weights hold {held:,}")


# ---- dense
# The weight of a layer as a plain matrix, whatever a quantiser has made of it. V: vocabulary, T: the target's width.

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_plain(module: nn.Module) -> bool:
    """Whether `module.weight` alone says what the layer does, in numbers that mean what they say (a bias may be there)."""
    weight: Any = getattr(module, "weight", None)
    names = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    return (
        type(weight) in (nn.Parameter, Tensor) and weight.dtype in FLOATS and names <= {"weight", "bias", "embed_scale"}
    )


@torch.no_grad()
def dense_head(head: nn.Module, width: int, dtype: torch.dtype, device: torch.device, chunk: int = 256) -> Tensor:
    """[V, T]: the matrix that a linear layer multiplies by, found by giving it the rows of the identity.

    Exact for what stores its weight in fewer bits and multiplies in `dtype`; `FrozenTarget.check` compares the result with
    the model's own logits.

    Args:
        width: T. chunk: rows of the identity at a time.
    """
    weight_VT: Tensor | None = None
    for start in range(0, width, chunk):
        identity = torch.eye(min(chunk, width - start), width, dtype=dtype, device=device).roll(start, dims=1)
        columns = head(identity)
        if weight_VT is None:
            weight_VT = columns.new_empty(columns.shape[1], width, dtype=dtype)
        weight_VT[:, start : start + chunk] = columns.T
    assert weight_VT is not None
    return weight_VT


@torch.no_grad()
def dense_embeddings(embeddings: nn.Module, vocab_size: int, device: torch.device) -> Tensor:
    """[V, T]: what a table of embeddings answers for every token."""
    return embeddings(torch.arange(vocab_size, device=device)[None])[0]


# ---- frozen
# The frozen target: a transformers causal LM that gives features, last hidden states and its head's rows.
#
# Only the base model runs, so no logits of the whole vocabulary exist; hooks keep the inputs of three layers, so no other
# hidden state outlives its layer. B: rows, L: columns, T: hidden size, V: draft vocabulary.


class FrozenTarget(TargetBase):
    """A target that computes what is asked of it.

    Args:
        model: any transformers causal LM with a stack of decoder layers.
        layer_ids: three layers whose *input* is a feature, ascending; None is `default_layer_ids`.
        chunk_tokens: give the model at most so many tokens at a time; None: whole batches.

    Raises:
        ValueError: for a target whose labels or features would be wrong (see `refuse_unfit`).
    """

    def __init__(
        self, model: nn.Module, layer_ids: Sequence[int] | None = None, chunk_tokens: int | None = None
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
        refuse_unfit(self.config)
        head = model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise ValueError(f"target {type(model).__name__} has no output embeddings: it is no causal LM")
        if getattr(head, "bias", None) is not None:
            raise ValueError(
                f"target {type(model).__name__} has a bias on its head, which labels would miss: unsupported"
            )
        self.head: nn.Module = head
        self.base: nn.Module = _base_model(model)
        self._dense: Tensor | None = None  # of a quantised head
        if not is_plain(head):
            self._dense = self._dense_head()
        self.layers = _decoder_layers(self.base, self.config.num_hidden_layers)
        self.layer_ids = list(layer_ids) if layer_ids is not None else default_layer_ids(len(self.layers))
        if sorted(set(self.layer_ids)) != self.layer_ids or len(self.layer_ids) != 3:
            raise ValueError(f"target.layer_ids is {self.layer_ids}; it must be three distinct ids, ascending")
        if not 0 <= self.layer_ids[0] <= self.layer_ids[-1] < len(self.layers):
            raise ValueError(f"target.layer_ids is {self.layer_ids}; ids must lie in 0..{len(self.layers) - 1}")
        self.chunk_tokens = chunk_tokens
        self.apart = False
        self.flattens = takes_bounds(model, self.config)
        self.sharded = False
        if chunk_tokens is not None:
            check_chunkable(model, self.base, self.config)

    @classmethod
    def load(
        cls,
        path: str,
        *,
        dtype: str = "auto",
        device: torch.device | None = None,
        layer_ids: Sequence[int] | None = None,
        chunk_tokens: int | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        device_map: str | None = None,
        shard: bool = False,
    ) -> "FrozenTarget":
        """Load a Hugging Face folder; ValueError, one line, for a folder that is none.

        device_map: spread over the devices that this process sees, as accelerate does it. shard: over all ranks, by FSDP2;
        `world_mesh` must have been called before.
        """
        device = device or torch.device("cpu")
        model = load_model(path, resolve_dtype(dtype, device), attn_implementation, trust_remote_code, device_map)
        # A sharded one moves to the device a layer at a time, and one with a device map is where it belongs.
        target = cls(model if shard or device_map else model.to(device), layer_ids, chunk_tokens)
        if shard:
            target.shard(device)
        return target

    @property
    def attn_implementation(self) -> str | None:
        """transformers' name of the attention that runs, chosen or its default."""
        return getattr(self.config, "_attn_implementation", None)

    def shard(self, device: torch.device) -> None:
        """Shard all but the head over all ranks and move it to the device; the head stays whole, on the CPU.

        From then on every rank must call `features` and `embedding_rows` as often as the others.
        """
        if not all(parameter.is_floating_point() for parameter in self.model.parameters()):
            raise ValueError(f"target.shard is true, but target {type(self.model).__name__} is quantised: unsupported")
        self.sharded = True
        head: Any = self.head
        if head.weight is self.model.get_input_embeddings().weight:  # type: ignore[operator]
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        shard(self.base, self.layers, device)

    @property
    def vocab_size(self) -> int:
        return self.head_weight().shape[0]

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        embeddings: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        if has_offloaded_params(embeddings):
            return torch.device(embeddings._hf_hook.execution_device)
        return embeddings.weight.device

    def embedding_rows(self) -> Tensor:
        embeddings = self.model.get_input_embeddings()  # type: ignore[operator]
        if self.sharded or is_plain(embeddings):
            return _weight(embeddings)
        return dense_embeddings(embeddings, self.vocab_size, self.device)

    def head_weight(self) -> Tensor:
        """Of a quantised head what it multiplies by; on the CPU where the target is sharded or its head is offloaded."""
        return _weight(self.head) if self._dense is None else self._dense.detach()

    @property
    def has_plain_head(self) -> bool:
        """Whether the head is a matrix, not what a quantiser made of one."""
        return self._dense is None

    def eos_token_ids(self) -> list[int]:
        """By the target's config and its generation config."""
        return vocab.eos_token_ids(self.config, getattr(self.model, "generation_config", None))

    def final_norm(self) -> nn.Module:
        """The module whose output the last hidden states are; ValueError if none is."""
        answers: list[tuple[nn.Module, Any]] = []
        handles = [
            module.register_forward_hook(lambda module, _, output: answers.append((module, output)))
            for module in self.base.modules()
            if module is not self.base
        ]
        try:
            with torch.no_grad():
                ids = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
                last = self.base(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        found = [module for module, output in answers if output is last]
        if not found:
            raise ValueError(f"target {type(self.model).__name__}: no module gives its last hidden states as they are")
        return found[-1]

    def _dense_head(self) -> Tensor:
        name = type(self.head).__name__
        norm = next((p for p in self.base.parameters() if p.dim() == 1 and p.dtype in FLOATS), None)
        dtype = self.model.dtype if norm is None else norm.dtype  # what its input comes in
        try:
            weight = dense_head(self.head, self.config.hidden_size, dtype, self.device)  # type: ignore[arg-type]
        except Exception as error:  # whatever a quantiser's layer raises
            raise ValueError(
                f"target {type(self.model).__name__} has a quantised head ({name}) that does not multiply on"
                f" {self.device.type}: {type(error).__name__}: {one_line(error, 300)}; leave the head unquantised"
            ) from error
        logger.warning("the target's head is quantised (%s): labels use the matrix that it multiplies by", name)
        return weight

    @torch.no_grad()
    def features(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, L, 3T] and last hidden states after the final norm [B, L, T], in the target's dtype.

        Packed documents do not see each other. Where attention heeds their bounds (`flattens`), all rows are given
        as one (`target_model.attention`). Else transformers tells documents apart by position ids that restart,
        as long as it is given neither an attention mask nor a cache. With `chunk_tokens`, or for a target that does
        neither (`apart`), see `target_model.chunks`.

        Args:
            input_ids: int64 [B, L], unshifted. position_ids: int64 [B, L], restarting at 0 with every document. On the
                host or on the target's device (bounds are found on the host: from the device, that waits for it).
        """
        B, L = input_ids.shape
        T = self.hidden_size
        whole = not self.apart and (self.chunk_tokens is None or B * L <= self.chunk_tokens)
        if whole and not self.flattens:
            shape, bounds, runs = (B, L), [], [Run(0, L, None)]
        else:
            shape, bounds = (1, B * L), document_bounds(position_ids.cpu())
            runs = [Run(0, B * L, None)] if whole else plan_runs(bounds, self.chunk_tokens, self.apart)
        idle = 0
        if self.sharded and (self.apart or self.chunk_tokens is not None):  # else each rank has one forward
            own = sum(run.forwards for run in runs)
            idle = max_counts([own], self.device)[0] - own
        ids = input_ids.to(self.device, non_blocking=True).reshape(shape)
        positions = position_ids.to(self.device, non_blocking=True).reshape(shape)
        out: dict[str, Tensor] = {}
        span = slice(0, 0)  # of the tokens that the model has now

        def keep(slot: int) -> Any:
            def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                if "features" not in out:
                    out["features"] = hidden.new_empty(*shape, 3 * T)
                out["features"][:, span, slot * T : (slot + 1) * T] = hidden

            return hook

        def begin(start: int, stop: int) -> None:
            nonlocal span
            span = slice(start, stop)

        def end(last_hidden: Tensor) -> None:
            if len(runs) == 1 and runs[0].chunk is None:
                out["last"] = last_hidden
                return
            if "last" not in out:
                out["last"] = last_hidden.new_empty(*shape, T)
            out["last"][:, span] = last_hidden

        handles = [
            self.layers[layer].register_forward_pre_hook(keep(slot), with_kwargs=True)
            for slot, layer in enumerate(self.layer_ids)
        ]
        told = bounds if self.flattens else None
        try:
            with bounds_heeded(self.config) if self.flattens else nullcontext():
                for run in runs:
                    forward_run(self.base, self.config, ids, positions, run, told, begin, end)
        finally:
            for handle in handles:
                handle.remove()
        for _ in range(idle):
            self.base(input_ids=ids[:, :1], position_ids=positions[:, :1], attention_mask=None, use_cache=False)
        return out["features"].view(B, L, 3 * T), out["last"].view(B, L, T)

    def outputs(self, batch: dict[str, Tensor], head_rows: Tensor) -> TargetOutputs:
        features, last_hidden = self.features(batch["input_ids"], batch["position_ids"])
        # With a device map, layers may end up anywhere.
        return TargetOutputs(features.to(head_rows.device), last_hidden.to(head_rows.device), head_rows)

    def check(self) -> None:
        """Run a few tokens and see that features and labels are what training takes them for; ValueError if not.

        A document in a batch of several rows of several documents must get the features that it gets alone (a target that
        does not isolate them gets one at a time from then on), chunks must give what the whole gives, and the model's own
        logits must be its head times the last hidden state.
        """
        check_target(self)


def _base_model(model: nn.Module) -> nn.Module:
    """The part of a causal LM below its head."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    base = decoder if decoder is not None else getattr(model, getattr(model, "base_model_prefix", ""), None)
    if not isinstance(base, nn.Module) or base is model:
        raise ValueError(f"target {type(model).__name__}: its base model was not found; unsupported architecture")
    return base


def _weight(module: Any) -> Tensor:
    """A module's weight, whole, whether sharded, offloaded by accelerate (then copied to the CPU) or neither."""
    with align_module_device(module, torch.device("cpu") if module.weight.is_meta else None):
        weight = whole(module.weight.detach())
        return weight.clone() if has_offloaded_params(module) else weight


def _decoder_layers(base: nn.Module, count: int) -> nn.ModuleList:
    found = [m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise ValueError(f"target {type(base).__name__}: no stack of {count} decoder layers found; unsupported")
    return found[0]
