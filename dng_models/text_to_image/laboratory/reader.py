"""Tokenizer and text encoder that keep every word of a caption, and what reads it back.

The tokenizer is a real CLIPTokenizer, to which every word of the world is one token; other words
are read byte by byte, so that a message can name them.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPTokenizer

from dng_models.support import files
from dng_models.text_to_image.laboratory.captions import Event, parse
from dng_models.text_to_image.laboratory.worlds import WORDS_OF_CAPTIONS, World

TOKENS = 77
BASE = 128
END_OF_WORD = "</w>"


def caption_tokenizer(world: World) -> CLIPTokenizer:
    """A CLIPTokenizer whose words are those of the world's captions.

    Parameters
    ----------
    world : World

    Returns
    -------
    CLIPTokenizer
        Of 77 tokens, as Stable Diffusion's.
    """
    # Loaded from files, because the argument that takes a vocabulary has another name in other
    # versions of transformers, and a wrong name is ignored.
    with tempfile.TemporaryDirectory() as folder:
        write_vocabulary(world, Path(folder))
        Path(folder, "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS}),
            encoding="utf-8",
        )
        return CLIPTokenizer.from_pretrained(folder)


def write_vocabulary(world: World, folder: Path) -> None:
    """Write ``vocab.json`` and ``merges.txt`` of a world's tokenizer.

    Transformers 5 saves its tokenizers without them, and version 4 loads none without.

    Parameters
    ----------
    world : World
    folder : Path
        An existing folder.
    """
    names = [*world.objects, *(scene.name for scene in world.scenes)]
    words = sorted({word for name in names for word in name.split()} | WORDS_OF_CAPTIONS)
    # Byte-level BPE writes a printable byte as its own character, and any other byte as a character
    # above 255 (GPT-2's bytes_to_unicode).
    printable = sorted({*range(33, 127), *range(161, 173), *range(174, 256)})
    characters = [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
    vocabulary = [*characters, *(character + END_OF_WORD for character in characters)]
    merges: dict[tuple[str, str], int] = {}  # with their ranks
    for word in words:
        while len(pieces := _pieces(word, merges)) > 1:
            merges[pieces[0], pieces[1]] = len(merges)
    vocabulary += dict.fromkeys(left + right for left, right in merges)
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    files.write_text(
        folder / "vocab.json", json.dumps({word: i for i, word in enumerate(vocabulary)})
    )
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    files.write_text(folder / "merges.txt", "\n".join(lines) + "\n")


def _pieces(word: str, merges: Mapping[tuple[str, str], int]) -> list[str]:
    """The tokens of a word: the merge of the lowest rank first, as BPE says."""
    pieces = [*word[:-1], word[-1] + END_OF_WORD]
    while True:
        known = [pair for pair in itertools.pairwise(pieces) if pair in merges]
        if not known:
            return pieces
        first = min(known, key=lambda pair: merges[pair])
        i = 0
        while i < len(pieces) - 1:
            if (pieces[i], pieces[i + 1]) == first:
                pieces[i : i + 2] = ["".join(first)]
            i += 1


class CaptionEncoder(nn.Module):
    """A text encoder whose embedding of a caption is its tokens.

    Each token's number is written as two digits to the base of 128, which every floating-point
    dtype holds.  What a caption says, and whether it can be read, is the network's to find, because
    guidance may encode other texts that no network is shown.

    Parameters
    ----------
    dtype : torch.dtype
        Of the embeddings.
    """

    def __init__(self, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        # Pipelines read a network's dtype and device from its parameters.
        self.anchor = nn.Parameter(torch.zeros((), dtype=dtype), requires_grad=False)
        self.config = FrozenDict(use_attention_mask=False)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the embeddings."""
        return self.anchor.dtype

    @property
    def device(self) -> torch.device:
        """The device that the pipeline was moved to."""
        return self.anchor.device

    def forward(self, input_ids: Tensor, attention_mask: Any = None) -> tuple[Tensor]:
        """The embeddings of captions, shape (B, 77, 2), in a tuple.

        Parameters
        ----------
        input_ids : Tensor, shape (B, 77), int64
            The tokenizer's.
        attention_mask : None
            Not used.
        """
        # Counted from 1, so that an embedding of zeros is no token.
        numbers = input_ids + 1
        digits = torch.stack([numbers // BASE, numbers % BASE], -1)
        return (digits.to(self.device, self.dtype),)


class EmbeddingReader:
    """Reads the captions back from embeddings of :class:`CaptionEncoder`.

    Parameters
    ----------
    world : World
        Whose captions they are.
    tokenizer : CLIPTokenizer
        Of :func:`caption_tokenizer`.
    """

    def __init__(self, world: World, tokenizer: CLIPTokenizer) -> None:
        self.world = world
        self._tokenizer = tokenizer
        self._known: dict[bytes, Event] = {}

    def __call__(self, embeddings: Tensor) -> list[Event]:
        """What each caption says; embeddings of zeros say nothing.

        Parameters
        ----------
        embeddings : Tensor, shape (B, L, 2)

        Raises
        ------
        ValueError
            If they have another shape, or as for :func:`.captions.parse`.
        """
        if embeddings.ndim != 3 or embeddings.shape[-1] != 2:
            raise ValueError(
                "encoder_hidden_states must be embeddings of captions, of shape (B, L, 2), got "
                f"{tuple(embeddings.shape)}"
            )
        try:
            values = embeddings.cpu().double().numpy(force=True)
        except RuntimeError:  # within a forward derivative the results of methods have no data
            values = np.asarray(embeddings.tolist())
        digits = np.rint(values).astype(np.int64)
        numbers = digits[..., 0] * BASE + digits[..., 1] - 1
        return [self._event(row) for row in numbers]

    def _event(self, row: NDArray[np.int64]) -> Event:
        key = row.tobytes()
        if key not in self._known:
            tokens = row[(row >= 0) & (row < len(self._tokenizer))]
            text = self._tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
            self._known[key] = parse(text, self.world)
        return self._known[key]
