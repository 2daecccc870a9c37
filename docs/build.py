"""A page of the Python API from its docstrings.

python docs/build.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import pdoc

import tortoise_jax


def main() -> None:
    for name in tortoise_jax.__all__:
        setattr(tortoise_jax, name, getattr(tortoise_jax, name))  # pdoc sees what is loaded
    tortoise_jax.__path__ = []  # and no modules: the one of the command `prepare` would hide the function
    pdoc.render.configure(docformat="markdown", search=False, footer_text=f"tortoise_jax {tortoise_jax.__version__}")
    pdoc.pdoc("tortoise_jax", output_directory=Path(sys.argv[1]))


if __name__ == "__main__":
    main()
