"""Answers of a target in this process, by transformers' `generate`: greedy, or sampled with a generator for each row.

B: rows of a batch, P: columns of the longest prompt, V: vocabulary.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LogitsProcessor, LogitsProcessorList

from peagle_train.answers.answers import Answer
from peagle_train.answers.prompts import Message
from peagle_train.data.vocab import eos_token_ids
from peagle_train.target.frozen import FrozenTarget


class KeyedSampling(LogitsProcessor):
    """Adds Gumbel noise to the scores, so that their argmax is a draw from the nucleus of softmax(scores / temperature).

    `generate` draws from the global generator, for all rows at once. Here each row has a generator of its own, so what it
    draws depends neither on the other rows of its batch nor on what was generated before.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [B, V] to noisy scores [B, V], -inf outside of the nucleus."""
        scores_BV = scores.float() / self.temperature
        if self.top_p < 1:
            scores_BV = nucleus(scores_BV, self.top_p)
        # In float64, an exponential draw is never 0, whose logarithm would win against everything.
        draws = [torch.empty(scores.shape[1], dtype=torch.float64).exponential_(generator=g) for g in self.generators]
        gumbel_BV = -torch.stack(draws).log().float()
        return scores_BV + gumbel_BV.to(scores.device)


def nucleus(scores_BV: Tensor, top_p: float) -> Tensor:
    """-inf for all tokens but the likeliest whose probabilities add up to top_p, the one that gets there included."""
    probabilities_BV, order_BV = scores_BV.softmax(-1).sort(descending=True, stable=True)
    before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
    outside_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter_(-1, order_BV, before_BV >= top_p)
    return scores_BV.masked_fill(outside_BV, -torch.inf)


class LocalChat:
    """A model and its chat template.

    Args:
        model: a transformers causal LM.
        tokenizer: its tokenizer, with a chat template.
        temperature: 0 takes the likeliest token. No other penalty or filter than `top_p` applies, whatever the model's
            generation_config says; its end tokens do.
        max_tokens: of an answer, its end token included.
        batch_size: conversations that are generated together.
        template_kwargs: further variables of the chat template, such as enable_thinking.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        temperature: float,
        top_p: float,
        max_tokens: int,
        batch_size: int,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"--batch-size is {batch_size}; give 1 or more")
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.temperature, self.top_p, self.max_tokens = temperature, top_p, max_tokens
        self.template_kwargs = dict(template_kwargs or {})
        self.end_ids = eos_token_ids(model.config.get_text_config(), model.generation_config, tokenizer)
        if not self.end_ids:
            raise ValueError("the target names no end token (eos_token_id), so its answers would never end")
        self.longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        # In place of the model's own, which `generate` would fill gaps from (top_k, repetition_penalty, ...).
        model.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=max_tokens, eos_token_id=self.end_ids, pad_token_id=self.end_ids[0]
        )

    @classmethod
    def load(cls, path: str, *, dtype: str = "auto", trust_remote_code: bool = False, **options: Any) -> "LocalChat":
        """From a Hugging Face folder, on the GPU if there is one; ValueError, one line, for a folder that does not fit."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # The checks of a training target; which layers are its features does not matter here.
        target = FrozenTarget.load(
            path, dtype=dtype, device=device, layer_ids=[0, 1, 2], trust_remote_code=trust_remote_code
        )
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"target {path} has no usable tokenizer: {' '.join(str(error).split())[:200]}") from None
        if not tokenizer.chat_template:
            raise ValueError(
                f"target {path} has no chat template, so it cannot be asked; give an instruction-tuned one"
            )
        return cls(target.model, tokenizer, **options)

    def identity(self, path: str) -> dict[str, Any]:
        """What the answers depend on besides prompts and sampling: files, dtype, kind of device, batch size."""
        folder = Path(path).expanduser()
        digest = hashlib.sha256(str(self.tokenizer.chat_template).encode())
        for file in sorted(folder.glob("*.json")):
            digest.update(file.name.encode() + file.read_bytes())
        for file in sorted(folder.glob("*.safetensors")):
            digest.update(f"{file.name},{file.stat().st_size}".encode())
        return {
            "backend": "local",
            "model": folder.resolve().name,
            "target": digest.hexdigest(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "batch_size": self.batch_size,
            "chat_template_kwargs": self.template_kwargs,
        }

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The conversation as the target reads it, up to where its answer begins; ValueError if its template cannot."""
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, **self.template_kwargs
            )
        except Exception as error:  # templates raise what they like, TemplateError mostly
            raise ValueError(f"the chat template fails: {' '.join(str(error).split())[:200]}") from None
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    @torch.no_grad()
    def answer(self, conversations: Sequence[Sequence[Message]], seeds: Sequence[int]) -> list[Answer]:
        """An answer to each conversation, generated together. Those that are too long for the target or that its template
        does not take are refused.
        """
        answers: list[Answer | None] = [None] * len(conversations)
        prompts: dict[int, list[int]] = {}
        for at, messages in enumerate(conversations):
            try:
                ids = self.prompt_ids(messages)
            except ValueError as error:
                answers[at] = Answer("", "refused", detail=str(error))
                continue
            if self.longest is not None and len(ids) + self.max_tokens > self.longest:
                detail = f"{len(ids)} tokens and {self.max_tokens} of answer are more than the target's {self.longest}"
                answers[at] = Answer("", "refused", detail=detail)
            else:
                prompts[at] = ids
        if prompts:
            rows = self._generate(list(prompts.values()), [seeds[at] for at in prompts])
            answers = [self._read(rows.pop(0)) if answer is None else answer for answer in answers]
        return [answer for answer in answers if answer is not None]

    def _generate(self, prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        """The tokens behind each prompt, whatever follows an end token included."""
        P = max(map(len, prompts))
        ids_BP = torch.tensor([[self.end_ids[0]] * (P - len(ids)) + ids for ids in prompts], device=self.model.device)
        mask_BP = torch.tensor([[0] * (P - len(ids)) + [1] * len(ids) for ids in prompts], device=self.model.device)
        sampling = [KeyedSampling(seeds, self.temperature, self.top_p)] if self.temperature > 0 else []
        out = self.model.generate(
            input_ids=ids_BP, attention_mask=mask_BP, logits_processor=LogitsProcessorList(sampling)
        )
        rows: list[list[int]] = out[:, P:].tolist()
        return rows

    def _read(self, ids: list[int]) -> Answer:
        end = next((at for at, token in enumerate(ids) if token in self.end_ids), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if end is None:
            return Answer(text, "length", tokens=len(ids))
        return Answer(text, "stop", tokens=end + 1)
