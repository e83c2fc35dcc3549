"""A SentencePiece BPE model as a fast tokenizer that gives the same ids.

What InternLM2's tokenizer needs, and no more: BPE with bytes as the fall-back, no normalisation,
and special tokens that may take over the id of a piece. Reading and writing checkpoints belongs to
`convert`; what is done with the ids to `template`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from trainer.errors import BadCheckpointError

SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces, as SentencePiece numbers them."""


def fast_tokenizer(
    file: Path, special: Mapping[int, AddedToken], *, before: tuple[str, ...] = ()
) -> Tokenizer:
    """The tokenizer of a `tokenizer.model` file.

    Args:
        file: a serialised SentencePiece model of type BPE.
        special: special tokens by id. One that has the id of a piece takes its place, and the
            piece's own spelling is ordinary text from then on.
        before: special tokens that open every sequence, such as `<s>`.

    Raises:
        BadCheckpointError: the file is not such a model, or does something to text that a fast
            tokenizer would not do in the same way.
    """
    proto = _read(file)
    pieces = [(piece.piece, piece.score, piece.type or NORMAL) for piece in proto.pieces]
    _require_supported(proto, [kind for _, _, kind in pieces], file)
    names = [special[i].content if i in special else p[0] for i, p in enumerate(pieces)]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        msg = f"{file}: two ids have one spelling: {', '.join(twice[:3])}; restore the folder"
        raise BadCheckpointError(msg)
    vocabulary = {name: i for i, name in enumerate(names)}
    ordinary = {
        piece: score
        for i, (piece, score, kind) in enumerate(pieces)
        if kind == NORMAL and i not in special
    }
    model = models.BPE(
        vocab=vocabulary,
        merges=list(_merges(ordinary)),
        unk_token=next(names[i] for i, p in enumerate(pieces) if p[2] == UNKNOWN),
        fuse_unk=True,
        byte_fallback=any(kind == BYTE for *_, kind in pieces),
    )
    tokenizer = Tokenizer(model)
    own = [p for i, (p, _, kind) in enumerate(pieces) if kind == USER_DEFINED and i not in special]
    prefixed = proto.normalizer_spec.add_dummy_prefix
    tokenizer.normalizer = _normalizer(own if prefixed else None)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefixed else []),
        ]
    )
    tokenizer.add_special_tokens(list(special.values()))
    tokenizer.add_tokens([AddedToken(piece, normalized=True) for piece in own])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([*before, "$A"]),
        special_tokens=[(token, vocabulary[token]) for token in before],
    )
    return tokenizer


def _read(file: Path) -> Any:
    from google.protobuf.message import DecodeError
    from transformers.utils import sentencepiece_model_pb2_new as schema

    proto = schema.ModelProto()  # type: ignore[attr-defined] # made when it is imported
    try:
        proto.ParseFromString(file.read_bytes())
    except (OSError, DecodeError) as error:
        msg = f"{file}: not a readable SentencePiece model ({error}); restore the file"
        raise BadCheckpointError(msg) from error
    return proto


def _require_supported(proto: Any, kinds: list[int], file: Path) -> None:
    faults = {
        "it is not of type BPE": proto.trainer_spec.model_type != 2,
        "it normalises text": bool(proto.normalizer_spec.precompiled_charsmap),
        "it removes extra spaces": proto.normalizer_spec.remove_extra_whitespaces,
        "it does not mark spaces": not proto.normalizer_spec.escape_whitespaces,
        "spaces go to the end of words": proto.trainer_spec.treat_whitespace_as_suffix,
        "it has unused pieces": UNUSED in kinds,
        "it has no unknown piece": UNKNOWN not in kinds,
    }
    found = [fault for fault, present in faults.items() if present]
    if found:
        msg = (
            f"{file}: {'; '.join(found)}: a fast tokenizer would give other ids. "
            "Only models like InternLM2's can be converted"
        )
        raise BadCheckpointError(msg)


def _merges(scores: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Every way to put a piece together out of two, the pieces with the best scores first."""
    order = sorted(scores, key=lambda piece: -scores[piece])  # stable: equal scores by id
    for piece in order:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                yield left, right


def _normalizer(prefix_unless: list[str] | None) -> normalizers.Normalizer:
    """Spaces become visible; with a list, a text also gets one in front.

    User-defined pieces are looked for in the normalised text, and the tokenizer puts them through
    the same normaliser, hence the exception for what is nothing but such a piece (the one text for
    which SentencePiece gives another id: it puts a space before it).
    """
    spaces = normalizers.Replace(" ", SPACE)
    if prefix_unless is None:
        return spaces
    if not prefix_unless:
        return normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
    alone = "|".join(re.escape(piece) for piece in prefix_unless)
    first = normalizers.Replace(Regex(rf"\A(?!(?:{alone})\z)(?=.|\n)"), SPACE)
    return normalizers.Sequence([spaces, first])


def spelling(file: Path, piece: int) -> str:
    """How a piece of a model file is spelled.

    Raises:
        BadCheckpointError: the model has no such piece.
    """
    pieces = _read(file).pieces
    if not 0 <= piece < len(pieces):
        msg = f"{file}: no piece has id {piece}; there are {len(pieces)}"
        raise BadCheckpointError(msg)
    return pieces[piece].piece
