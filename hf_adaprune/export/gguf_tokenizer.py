"""A tokenizer as the metadata of a GGUF file.

llama.cpp has the regular expressions that split text before the merges built in, and the file only names one. A wrong
name gives slightly wrong tokens for a few texts and no error, so the name is found by comparing what the tokenizer
really does, and a tokenizer that is none of them is refused.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

from ..calibration import begin_token
from ..errors import UnsupportedModelError

__all__ = ["Vocabulary", "read_vocabulary"]

logger = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_ADVICE = "Name a checkpoint with the tokenizer that the model was trained with; no other can be exported."
_FLAGS = ("lstrip", "rstrip", "single_word")  # of added tokens
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = "byte-level words"
# Splits in their order, and whether merges are skipped for words that are tokens: llama.cpp's name for it.
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    (("digits", _GPT2), False): "smollm",
    ((_CONTRACTIONS + _WORDS % "{1,3}",), True): "llama-bpe",
    ((_LETTERS + _WORDS % "{1,3}",), True): "llama-bpe",
    ((_CONTRACTIONS + _WORDS % "",), False): "qwen2",
    ((_LETTERS + _WORDS % "",), False): "qwen2",
}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in llama.cpp's terms.

    Args:
        model (`str`): `gpt2` for byte-level merges, `llama` for SentencePiece's.
        pre (`str`): name of the regular expressions that split text.
        tokens (`tuple[str, ...]`): one for every row of the embedding.
        types (`tuple[int, ...]`): llama.cpp's token types.
        merges (`tuple[str, ...]`): pairs, best first; empty for `llama`.
        scores (`tuple[float, ...]`): of the tokens; empty for `gpt2`.
        special (`dict[str, int]`): ids of `bos`, `eos`, `unknown`, `padding`.
        flags (`dict[str, bool]`): `add_bos_token`, `add_eos_token`, `add_space_prefix`.
        chat_template (`str`): empty where the tokenizer has none.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    special: dict[str, int]
    flags: dict[str, bool]
    chat_template: str


def read_vocabulary(tokenizer: Any, rows: int, model: Any = None) -> Vocabulary:
    """The vocabulary of a tokenizer, padded to the rows of an embedding.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): a fast one.
        rows (`int`): of the embedding.
        model (`PreTrainedModel`, *optional*): names BOS and EOS where the tokenizer does not, by its generation config
            or its config; the first one of several.

    Raises:
        UnsupportedModelError: llama.cpp would tokenise differently, or there are more tokens than rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            f"a {type(tokenizer).__name__} has no tokenizer.json, which the export reads. Load it with AutoTokenizer. "
            + _ADVICE
        )
    spec = json.loads(backend.to_str())
    rules = spec["model"]
    if rules["type"] != "BPE" or rules.get("continuing_subword_prefix") or rules.get("end_of_word_suffix"):
        raise UnsupportedModelError(
            f"a tokenizer of type {rules['type']} is not written; byte-pair encoding is. {_ADVICE}"
        )
    _check_added(backend, spec)
    merges: tuple[str, ...] = ()
    if rules.get("byte_fallback"):
        space = _sentencepiece_prefix(spec)
        scores = _scores(rules)
        kind, pre = "llama", "default"
    else:
        space = None
        kind, pre, scores = "gpt2", _pre_tokenizer(spec), {}
        merges = tuple(_pair(merge) for merge in rules["merges"])
    tokens, types = _tokens(spec, rows, kind)
    flags = _added(tokenizer)
    if space is not None:
        flags["add_space_prefix"] = space
    return Vocabulary(
        kind,
        pre,
        tokens,
        types,
        merges,
        tuple(scores.get(token, 0.0 if types[row] == NORMAL else -1000.0) for row, token in enumerate(tokens))
        if kind == "llama"
        else (),
        _special(tokenizer, rows, model),
        flags,
        _template(tokenizer),
    )


def _pre_tokenizer(spec: dict[str, Any]) -> str:
    normalizer = spec.get("normalizer")
    # llama.cpp normalises nothing; text is in NFC already, nearly always.
    if normalizer and _parts(normalizer, "normalizers") != [{"type": "NFC"}]:
        raise UnsupportedModelError(
            f"this tokenizer normalises text ({normalizer['type']}), which llama.cpp would not do. {_ADVICE}"
        )
    splits: list[str] = []
    byte_level = False
    for part in _parts(spec.get("pre_tokenizer") or {}, "pretokenizers"):
        if part.get("type") == "ByteLevel" and not part.get("add_prefix_space"):
            byte_level = True
            splits += [_GPT2] if part.get("use_regex", True) else []
        elif part.get("type") == "Digits" and part.get("individual_digits"):
            splits.append("digits")
        elif part.get("type") == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
            splits.append(str(part["pattern"].get("Regex")))
        else:
            splits.append(json.dumps(part))
    name = PRE_TOKENIZERS.get((tuple(splits), bool(spec["model"].get("ignore_merges"))))
    if name is None or not byte_level:
        raise UnsupportedModelError(
            f"llama.cpp is not known to split text as this tokenizer does ({'; '.join(splits) or 'not at all'}) and "
            f"would see other tokens. Known: {', '.join(sorted(set(PRE_TOKENIZERS.values())))}. {_ADVICE}"
        )
    return name


def _parts(spec: dict[str, Any], inner: str) -> list[dict[str, Any]]:
    return [part for one in spec[inner] for part in _parts(one, inner)] if spec.get("type") == "Sequence" else [spec]


def _pair(merge: Any) -> str:
    pair = merge.split(" ") if isinstance(merge, str) else list(merge)
    if len(pair) != 2 or any(" " in piece for piece in pair):
        raise UnsupportedModelError(f"the merge {merge!r} holds a space, which a GGUF file cannot say. {_ADVICE}")
    return " ".join(pair)


def _sentencepiece_prefix(spec: dict[str, Any]) -> bool:
    """Whether a space is put before the text, of a tokenizer that works as SentencePiece does."""
    normal = _parts(spec.get("normalizer") or {}, "normalizers")
    before = _parts(spec.get("pre_tokenizer") or {}, "pretokenizers")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    if before == [{}] and normal in ([{"type": "Prepend", "prepend": "\u2581"}, replace], [replace]):
        return len(normal) == 2
    if (
        normal == [{}]
        and len(before) == 1
        and before[0].get("type") == "Metaspace"
        and not before[0].get("split", True)
    ):
        scheme = before[0].get("prepend_scheme")
        if scheme != "never":
            logger.warning(
                "llama.cpp puts a space before every text, and after special tokens; this tokenizer does not where "
                "text begins with a space%s. Tokens differ there.",
                ", or follows a special token" if scheme == "first" else "",
            )
        return scheme != "never"
    raise UnsupportedModelError(
        f"this tokenizer falls back to bytes as SentencePiece does, but prepares text otherwise. {_ADVICE}"
    )


def _scores(model: dict[str, Any]) -> dict[str, float]:
    """Scores that make SentencePiece's rule (join the pair whose token scores highest) follow the merges' order."""
    scores: dict[str, float] = {}
    last = ""
    for rank, merge in enumerate(model["merges"]):
        token = _pair(merge).replace(" ", "")
        if token in scores and token != last:
            raise UnsupportedModelError(
                f"the merges of {token!r} do not follow one another, so no score per token orders them. {_ADVICE}"
            )
        scores.setdefault(token, -float(rank + 1))
        last = token
    return scores


def _tokens(spec: dict[str, Any], rows: int, kind: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    vocabulary: dict[str, int] = spec["model"]["vocab"]
    added = {entry["id"]: entry for entry in spec.get("added_tokens", ())}
    largest = max([*vocabulary.values(), *added])
    if largest >= rows:
        raise UnsupportedModelError(
            f"the tokenizer has ids up to {largest}, the model's embedding {rows} rows. Resize the embedding, or pass "
            "the model's own tokenizer."
        )
    tokens = [f"[PAD{row}]" for row in range(rows)]
    types = [UNUSED] * rows
    for token, row in vocabulary.items():
        tokens[row], types[row] = token, NORMAL
        if kind == "llama" and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[row] = BYTE
    for row, entry in added.items():
        tokens[row], types[row] = entry["content"], CONTROL if entry["special"] else USER_DEFINED
    unknown = spec["model"].get("unk_token")
    if kind == "llama" and unknown in vocabulary:
        types[vocabulary[unknown]] = UNKNOWN
    return tuple(tokens), tuple(types)


def _check_added(backend: Any, spec: dict[str, Any]) -> None:
    """Refuse added tokens that take the space beside them, or that are none inside words: a GGUF file cannot say it."""
    flagged = [entry for entry in spec.get("added_tokens", ()) if any(entry.get(flag) for flag in _FLAGS)]
    if not flagged:
        return
    from tokenizers import Tokenizer

    plain = [{**entry, **dict.fromkeys(_FLAGS, False)} for entry in spec["added_tokens"]]
    without = Tokenizer.from_str(json.dumps({**spec, "added_tokens": plain}))
    wrong = []
    for entry in flagged:
        texts = [text % entry["content"] for text in ("a%sa", "a %s a", "a\n%s\na", " %s ")]
        if any(backend.encode(text).ids != without.encode(text).ids for text in texts):
            wrong.append(f"{entry['content']!r} ({', '.join(flag for flag in _FLAGS if entry.get(flag))})")
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise UnsupportedModelError(
            f"llama.cpp would tokenise differently around the added tokens {', '.join(wrong[:8])}{more}: a GGUF file "
            "cannot say that a token takes the spaces beside it, or is none inside a word. Add them without these "
            f"flags (AddedToken), where the model does not rely on that. {_ADVICE}"
        )


def _special(tokenizer: Any, rows: int, model: Any = None) -> dict[str, int]:
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    for name in ("bos", "eos"):
        for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
            if ids[name] is None:
                stated = getattr(config, f"{name}_token_id", None)
                ids[name] = next(iter(stated), None) if isinstance(stated, (list, tuple)) else stated
    return {name: number for name, number in ids.items() if number is not None and 0 <= number < rows}


def _added(tokenizer: Any) -> dict[str, bool]:
    """Which tokens the tokenizer puts around a text by itself."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    begins = begin_token(tokenizer) is not None
    ends = eos is not None and full[-1:] == [eos] and bare[-1:] != [eos]
    if full != [bos] * begins + bare + [eos] * ends:
        raise UnsupportedModelError(f"this tokenizer adds more to a text than its first and last token. {_ADVICE}")
    return {"add_bos_token": begins, "add_eos_token": ends}


def _template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template or ""
