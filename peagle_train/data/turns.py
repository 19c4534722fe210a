"""Where in the text of a chat the assistant's turns stand, and which tokens lie in them.

A span is (start, end) in characters; n: tokens of the text, S: spans.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peagle_train.data.chat_template import ChatTemplate


@dataclass(frozen=True)
class TokenizedText:
    """A text and its tokens."""

    text: str
    ids: list[int]
    starts_n: Tensor
    """int64 [n]: the character that a token begins at."""
    ends_n: Tensor
    """int64 [n]: the character behind a token's last one."""


class TurnFinder:
    """Knows the tokens and the habits of a template that tell where a turn ends.

    Added tokens (`<|im_end|>`, `<tool_call>`, ...) are those that the tokenizer never makes of other text's parts.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate) -> None:
        added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        self.added = tuple(added.values())
        self._added_ids = frozenset(added)
        self._added_or_space = re.compile("|".join([r"\s", *map(re.escape, self.added)]))
        self._chat_end = self._find_chat_end(template)

    def generated(self, whole: TokenizedText, prompt: str, until_turn: str) -> tuple[int, int] | None:
        """The span of a turn as the target generates it; None if the whole chat does not hold it so.

        Args:
            whole: the chat.
            prompt: the rendering of all messages before the turn, with the generation prompt.
            until_turn: the rendering up to and with the turn.
        """
        text = whole.text
        if not text.startswith(prompt) or not until_turn.startswith(prompt):
            return None
        if text.startswith(until_turn):
            end = len(until_turn)
            if end == len(text) and self._chat_end and text.endswith(self._chat_end):
                end -= len(self._chat_end)
            return len(prompt), end
        # Only what ends the turn may differ: some templates close the last one with another token (gpt-oss, Phi 3).
        end = _common_prefix(text, until_turn)
        cut_n = (whole.starts_n < end) & (whole.ends_n > end)
        end = min([end, *whole.starts_n[cut_n].tolist()])
        is_same = end > len(prompt) and not self._added_or_space.sub("", until_turn[end:])
        return (len(prompt), end) if is_same else None

    def with_its_end(self, whole: TokenizedText, span: tuple[int, int]) -> tuple[tuple[int, int], bool]:
        """The span up to and with the end-of-turn token, and whether there is one.

        That is the last added token, if nothing but white space stands behind it; without one the span ends before its
        trailing white space.
        """
        text, (start, end) = whole.text, span
        while end > start and text[end - 1].isspace():
            end -= 1
        if not text.endswith(self.added, start, end):
            return (start, end), False
        # A token that takes the white space behind it along (rstrip, as in Phi 3) is one with it.
        for token in torch.nonzero((whole.starts_n < end) & (whole.ends_n > end)).flatten().tolist():
            token_end = int(whole.ends_n[token])
            if whole.ids[token] in self._added_ids and text[end:token_end].isspace():
                end = token_end
        return (start, end), True

    def _find_chat_end(self, template: ChatTemplate) -> str:
        """What the template writes behind a chat's last end-of-turn token but not behind earlier ones (mostly "")."""
        last, earlier = template.behind_answer, template.behind_earlier_answer
        common = _common_prefix(last, earlier)
        while common and not last.endswith(self.added, 0, common):
            common -= 1
        chat_end = last[common:].lstrip() if common else ""
        return chat_end if not self._added_or_space.sub("", chat_end) else ""


def mask_spans(whole: TokenizedText, spans: list[tuple[int, int]]) -> tuple[list[int], int]:
    """1 for each token wholly inside a span (ascending, disjoint), else 0; and how many straddle a span's border."""
    if not spans:
        return [0] * len(whole.ids), 0
    first_S, last_S = torch.tensor(spans, dtype=torch.int64).T.contiguous()
    span_n = torch.searchsorted(first_S, whole.starts_n, right=True) - 1
    last_n = last_S[span_n.clamp(min=0)]
    is_inside_n = (span_n >= 0) & (whole.ends_n <= last_n) & (whole.starts_n < last_n)
    borders = torch.cat([first_S, last_S]).unique()
    next_border_n = torch.searchsorted(borders, whole.starts_n, right=True)
    is_straddling_n = next_border_n < torch.searchsorted(borders, whole.ends_n)
    return is_inside_n.int().tolist(), int(is_straddling_n.sum())


def _common_prefix(first: str, second: str) -> int:
    """How many characters two strings have in common at their start, by bisection."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first.startswith(second[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low
