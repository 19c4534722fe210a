"""Write docs/keys.md: every key of a recipe with its type, default, limits and meaning, as peagle_train/config.py has them.

python tools/document_keys.py
"""

import ast
import re
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG, PAGE = ROOT / "peagle_train" / "config.py", ROOT / "docs" / "keys.md"
HEAD = """# Every key of a recipe

You want to know what a key does, or look for one that you know [from another trainer](#what-others-call-them).

Written by `tools/document_keys.py` from `peagle_train/config.py`. A key without a default has to be given; null stands for
what the text says. Lengths are in tokens, sizes of batches in sequences, learning rates per optimizer step.
"""
TABLE = """
## What others call them

A recipe or command with a name of this table is answered with ours. A name that is the same with us (learning_rate, seed,
num_depths) only needs its section. Values can differ: `data.eval_fraction` is what is held out, `train.warmup_ratio` a
share of the steps.

| ours | TRL, transformers | axolotl | speculators 0.9.0 |
|---|---|---|---|
"""


def page(source: str) -> str:
    """The whole page, from the recipe's source."""
    module = ast.parse(source)
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    parts = [HEAD]
    for section in [node.target.id for node in classes["Recipe"].body if isinstance(node, ast.AnnAssign)]:
        body = classes[section.capitalize()].body
        parts.append(f"\n## {section}\n\n{ast.get_docstring(classes[section.capitalize()])}\n")
        parts.append("\n| key | type | default | |\n|---|---|---|---|\n")
        for field, text in pairwise(body[1:]):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                kind, limits = _hint(ast.unparse(field.annotation))
                default = "" if field.value is None else f"`{_yaml(field.value)}`"
                words = " ".join(ast.literal_eval(text.value).split())
                cells = [f"`{section}.{field.target.id}`", f"`{kind}`{limits}", default, words]
                parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    assigned = {ast.unparse(node.targets[0]): node.value for node in module.body if isinstance(node, ast.Assign)}
    parts.append(TABLE)
    for ours, theirs in ast.literal_eval(assigned["ELSEWHERE"]).items():
        parts.append(f"| `{ours}` | " + " | ".join(", ".join(f"`{n}`" for n in x.split()) for x in theirs) + " |\n")
    return "".join(parts)


PLAIN = {
    "Count": "int",
    "Text": "str",
    "FilePath": "str",
    "Sources": "list[str | dict]",
    "SomeSources": "list[str | dict]",
    "Extensions": "list[str]",
    "Layers": "list[int]",
    "Steps": "list[int]",
    "Plain": "dict",
    "Share": "float",
    "Percent": "str",
}
LIMITS = {"Count": ">= 1", "Share": ">= 0, < 1"}
SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def _hint(hint: str) -> tuple[str, str]:
    """A field's type as a reader of recipes thinks of it, and its limits, in words."""
    limits = [text for name, text in LIMITS.items() if re.search(rf"\b{name}\b", hint)]
    if found := re.search(r"within\(([^)]*)\)", hint):
        limits = [f"{SIGNS[sign]} {limit}" for sign, limit in re.findall(r"(\w\w)=([^,]+)", found[1])]
    hint = re.sub(r"Annotated\[(\w+(?:\[\w+\])?), (?:[^\[\]]|\[[^\]]*\])*\]", r"\1", hint)
    hint = re.sub(r"\b\w+\b", lambda word: PLAIN.get(word[0], word[0]), hint)
    return hint.replace("| None", "| null"), f" ({', '.join(limits)})" if limits else ""


def _yaml(value: ast.expr) -> str:
    if isinstance(value, ast.Call):  # field(default_factory=...)
        factory = value.keywords[0].value
        return _yaml(factory.body) if isinstance(factory, ast.Lambda) else "[]"
    words = {"None": "null", "True": "true", "False": "false"}
    return re.sub(r"\b(None|True|False)\b", lambda found: words[found[0]], ast.unparse(value)).replace("'", "")


if __name__ == "__main__":
    PAGE.write_text(page(CONFIG.read_text(encoding="utf-8")), encoding="utf-8")
