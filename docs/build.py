"""A page of the Python API from its docstrings.

python docs/build.py FOLDER
"""

from __future__ import annotations

from pathlib import Path

import pdoc

import tortoise_jax
from tortoise_jax.errors import Parser, exit_with_one_line


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the page is written")
    folder = parser.parse_args().folder
    for name in tortoise_jax.__all__:
        setattr(tortoise_jax, name, getattr(tortoise_jax, name))  # pdoc sees what is loaded
    tortoise_jax.__path__ = []  # and no modules: the one of the command `prepare` would hide the function
    pdoc.render.configure(docformat="markdown", search=False, footer_text=f"tortoise_jax {tortoise_jax.__version__}")
    pdoc.pdoc("tortoise_jax", output_directory=folder)


if __name__ == "__main__":
    exit_with_one_line(main)
