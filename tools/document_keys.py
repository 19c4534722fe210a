"""Write docs/keys.md: every key of a recipe with its type, default, limits and meaning, as peagle_train/recipe.py has them.

python tools/document_keys.py            # writes the page
python tools/document_keys.py --check    # exit code 1 if the page is not what would be written
"""

import argparse
import ast
import re
import sys
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPE, PAGE = ROOT / "peagle_train" / "recipe.py", ROOT / "docs" / "keys.md"
HEAD = """# Every key of a recipe

Written by `tools/document_keys.py` from `peagle_train/recipe.py`. A key without a default has to be given; null stands for
what the text says. Lengths are in tokens, sizes of batches in rows, learning rates per optimizer step.
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
                kind, default, limits = ast.unparse(field.annotation), *_default(field.value)
                words = " ".join(ast.literal_eval(text.value).split())
                cells = [f"`{section}.{field.target.id}`", f"`{kind}`{limits}", default, words]
                parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return "".join(parts)


def _default(value: ast.expr | None) -> tuple[str, str]:
    """The default and the limits, in words."""
    if not isinstance(value, ast.Call):
        return ("" if value is None else f"`{_yaml(value)}`"), ""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [f"{signs[k.arg]} {ast.unparse(k.value)}" for k in value.keywords if k.arg in signs]
    default = f"`{_yaml(value.args[0])}`" if value.args else ""
    return default, f" ({', '.join(limits)})" if limits else ""


def _yaml(value: ast.expr) -> str:
    words = {"None": "null", "True": "true", "False": "false"}
    return re.sub(r"\b(None|True|False)\b", lambda found: words[found[0]], ast.unparse(value)).replace("'", "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args()
    text = page(RECIPE.read_text(encoding="utf-8"))
    if not options.check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(f"{PAGE.name} is not what peagle_train/recipe.py says: run python tools/document_keys.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
