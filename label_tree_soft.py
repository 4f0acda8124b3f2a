#!/usr/bin/env python
"""`label_tree.py --soft` under its published name: label trees for soft values.

python label_tree_soft.py DIR <objective|all> --dataset anthropic
"""

from __future__ import annotations

import sys

import label_tree
from label_tree import build_parser  # noqa: F401  the arguments are the same
from utils import cli


def main(argv: list[str] | None = None) -> int:
    return label_tree.main([*(sys.argv[1:] if argv is None else argv), "--soft"])


if __name__ == "__main__":
    sys.exit(cli.run(main))
