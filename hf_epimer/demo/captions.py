"""What the drawings of the demonstration zoo are called: the four families, captions for the base, and a tokenizer.

The tokenizer is CLIP's kind (byte-pair merges, `</w>` ends a word) with a vocabulary made so that every word of the
captions is one token. Words are taken in order; a word that the merges so far leave in pieces adds the merges that
join its pieces from the left. Merges are applied in the order in which they were added, so later words cannot break
up earlier ones, and the same captions always give the same vocabulary.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from numpy.random import Generator
from PIL import Image
from transformers import CLIPTokenizer

from hf_epimer.demo.drawings import COLOURS, DRAWINGS, KINDS, LETTERS, draw_letter

LONGEST_TEXT = 16
EASY = 0.15
WORD_END = "</w>"


@dataclass(frozen=True)
class Family:
    """One drawn task: what it shows, the prompts of its head, and the difficulty its drawings reach."""

    title: str
    templates: tuple[str, ...]
    difficulty: float


FAMILIES = {
    "shapes": Family("Outlines of shapes among clutter", ("a drawing of a {}.", "the outline of a {}."), 0.35),
    "digits": Family("Slanted digits between neighbours", ("a picture of the digit {}.", "the number {}."), 0.4),
    "textures": Family("Warped and faint textures", ("a texture of {}.", "a pattern of {}."), 0.75),
    "signs": Family("Small, faded, partly hidden road signs", ("a {} sign.", "a road sign that says {}."), 0.8),
}


def captioned_drawings(count: int, rng: Generator) -> tuple[list[Image.Image], list[str]]:
    """Easy drawings of all families and of letters; half of the shapes and textures name their colour."""
    images, captions = [], []
    topics = [*FAMILIES, "letters"]
    for i in range(count):
        topic, difficulty = topics[i % len(topics)], rng.uniform(0, EASY)
        if topic == "letters":
            letter = LETTERS[rng.integers(len(LETTERS))]
            images.append(draw_letter(letter, rng, difficulty))
            captions.append(f"the letter {letter}.")
            continue
        kind = subject = KINDS[topic][rng.integers(len(KINDS[topic]))]
        options = {}
        if topic in ("shapes", "textures") and rng.random() < 0.5:
            options["colour"] = list(COLOURS)[rng.integers(len(COLOURS))]
            subject = f"{options['colour']} {kind}"
        images.append(DRAWINGS[topic](kind, rng, difficulty, **options))
        templates = FAMILIES[topic].templates
        captions.append(templates[rng.integers(len(templates))].replace("{}", subject))
    return images, captions


def all_texts() -> list[str]:
    """Texts that hold every word a caption can hold, whichever were drawn."""
    templates = [template for family in FAMILIES.values() for template in family.templates]
    kinds = [kind for family in KINDS.values() for kind in family]
    return [*templates, *kinds, *COLOURS, *(f"the letter {letter}." for letter in LETTERS)]


def make_tokenizer(texts: Iterable[str]) -> CLIPTokenizer:
    """A CLIP tokenizer, built in memory, that reads every word of these texts as one token."""
    words = sorted({word for text in texts for word in re.findall(r"\w+|\.", text.lower())})
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = [*word[:-1], word[-1] + WORD_END]
        for pair in merges:
            pieces = _join(pieces, pair)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _join(pieces, merges[-1])
    letters = sorted({letter for word in words for letter in word})
    tokens = [*letters, *(letter + WORD_END for letter in letters), *(left + right for left, right in merges)]
    # The end of the text comes last: CLIP's text tower may look for it as the largest number in a row.
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return clip_tokenizer(tokens, merges, LONGEST_TEXT)


def clip_tokenizer(tokens: Sequence[str], merges: Iterable[tuple[str, str]], longest: int) -> CLIPTokenizer:
    """A tokenizer with these tokens, numbered from 0, and these merges; texts are cut to `longest` tokens.

    By way of vocab.json and merges.txt, which every release of transformers reads.
    """
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = {token: number for number, token in enumerate(tokens)}
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        Path(folder, "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=longest)


def _join(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """Apply one merge to a word, from left to right."""
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined
