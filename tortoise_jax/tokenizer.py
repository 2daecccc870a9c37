"""A tokenizer for another language, learnt from transcripts.

python -m tortoise_jax.tokenizer --data VOICE --out own.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tortoise_jax.data.manifests import read_inputs
from tortoise_jax.errors import Parser, UserError, count_of, exit_with_one_line
from tortoise_jax.files import check_writable, write_atomically
from tortoise_jax.text import bpe
from tortoise_jax.text.cleaners import CLEANERS, check_cleaner


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m tortoise_jax.tokenizer",
        description="Learns a tokenizer (BPE) from transcripts, for a language whose letters the released models do\n"
        "not know. Give it to prepare with the same cleaner: --cleaner basic --tokenizer own.json; train.py grows the\n"
        "text tables of the model for it.",
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="PATH", help="as prepare is given it")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .json to write")
    parser.add_argument("--format", metavar="NAME", help="of all inputs, where it is not recognised rightly")
    parser.add_argument(
        "--cleaner", default="basic", metavar="NAME", help=f"{', '.join(CLEANERS)} (default %(default)s)"
    )
    size_help = "most tokens (default %(default)s, as the released models have); more suit many hours of speech"
    parser.add_argument("--size", type=int, default=bpe.SIZE, metavar="N", help=size_help)
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse()
    if arguments.out.suffix != ".json":
        raise UserError(f"--out {arguments.out}: expected a name ending in .json")
    check_writable(arguments.out, "--out")
    check_cleaner(arguments.cleaner, "--cleaner")
    clips = [clip for one in read_inputs(arguments.data, arguments.format) for clip in one.clips]
    texts = [clip.text for clip in clips if clip.text]
    tokenizer = bpe.train(texts, arguments.cleaner, arguments.size)
    write_atomically(arguments.out, tokenizer.to_json() + "\n")
    shown = tokenizer.encode(texts[0], arguments.cleaner)
    print(f"{arguments.out}: {count_of(tokenizer.vocab_size, 'token')} from {count_of(len(texts), 'transcript')}")
    print(f'the first one: "{texts[0]}" -> {len(shown)} tokens: {" ".join(map(tokenizer.token, shown))}')
    print(f"next: python -m tortoise_jax.prepare --cleaner {arguments.cleaner} --tokenizer {arguments.out} …")


if __name__ == "__main__":
    exit_with_one_line(main)
