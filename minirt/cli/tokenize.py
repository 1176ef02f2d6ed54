"""`minirt tokenize`: text to token ids, as the model sees it."""

from __future__ import annotations

import os
import sys

import click

from .options import model_argument
from .terminal import printable, read_stdin

MAX_TEXT = 64 << 20  # bytes


@click.command(
    epilog="""\b
Examples:
  minirt tokenize "Hello world"
  minirt tokenize model.gguf --ids < notes.txt
  minirt tokenize vocab-only.gguf "<|im_end|>" --no-parse-special
"""
)
@model_argument
@click.argument("text", required=False)
@click.option("--ids", is_flag=True, help="Only the ids, on one line.")
@click.option("--no-bos", is_flag=True, help="Do not begin with the BOS token.")
@click.option("--no-parse-special", is_flag=True, help="Take <|...|> as plain text, not as special tokens.")
def tokenize(model: str | None, text: str | None, ids: bool, no_bos: bool, no_parse_special: bool) -> None:
    """Prints the tokens of TEXT or of standard input.

    Byte for byte, but for control characters on a terminal. A single argument is MODEL if it is a file or ends in
    .gguf, else TEXT. A file that holds only a vocabulary will do.
    """
    if text is None and model is not None and not model.endswith(".gguf") and not os.path.isfile(model):
        model, text = None, model
    raw = os.fsencode(text) if text is not None else read_stdin(MAX_TEXT)

    from ..gguf_file import GGUFFile
    from ..llama import default_model_path
    from ..tokenizer import Tokenizer

    with GGUFFile.open(model if model is not None else default_model_path()) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata, str(file.path))
    tokens = tokenizer.encode_bytes(raw, add_bos=False if no_bos else None, parse_special=not no_parse_special)
    out, to_terminal = sys.stdout.buffer, sys.stdout.isatty()
    if ids:
        out.write(" ".join(map(str, tokens)).encode() + b"\n")
    else:
        for token in tokens:
            piece = tokenizer.token_bytes(token, special=True)
            if to_terminal:
                piece = printable(piece.decode(errors="replace")).encode()
            out.write(b"%6d -> '%s'\n" % (token, piece))
    out.flush()
