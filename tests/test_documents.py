"""Laws of text sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from texts import TEMPLATE, calibration_make_tokenizer, calibration_prose, text_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hf_adaprune.calibration import calibration_blocks
from hf_adaprune.config import TextSource
from hf_adaprune.documents import Documents, distinct_names, eval_mode, read_source, refuse_overlap
from hf_adaprune.errors import CalibrationError
from hf_adaprune.recovery_texts import report_texts


@pytest.fixture(scope="module")
def calibration_tokenizer() -> PreTrainedTokenizerFast:
    """With an end-of-sequence token and neither padding token nor chat template."""
    return calibration_make_tokenizer(eos_token="<eos>")


@pytest.fixture(scope="module")
def calibration_chat_tokenizer() -> PreTrainedTokenizerFast:
    """With a chat template that refuses an unknown role."""
    tokenizer = calibration_make_tokenizer(eos_token="<eos>")
    refuse = "{% for m in messages %}{% if m['role'] == 'stranger' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    tokenizer.chat_template = refuse + TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def calibration_model() -> LlamaForCausalLM:
    """A tiny Llama with random weights, in training mode."""
    return text_model()


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
ROWS = [
    ({"text": "plain"}, "plain", "plain"),
    ({"content": "plain", "id": 3}, "plain", "plain"),
    ({"messages": CHAT}, "<user>hi</><assistant>yes</>", "hi\n\nyes"),
    (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
        "<user>hi</><assistant>yes</>",
        "hi\n\nyes",
    ),
    ({"instruction": "do", "input": "it", "output": "ok"}, "<user>do\n\nit</><assistant>ok</>", "do\n\nit\n\nok"),
    ({"instruction": "do", "input": "", "output": "ok"}, "<user>do</><assistant>ok</>", "do\n\nok"),
    ({"prompt": "do", "completion": "ok"}, "<user>do</><assistant>ok</>", "do\n\nok"),
    ({"prompt": "do", "response": "ok"}, "<user>do</><assistant>ok</>", "do\n\nok"),
]


@pytest.mark.parametrize(("row", "rendered", "plain"), ROWS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "array"])
def test_every_kind_of_row(
    row: dict[str, object], rendered: str, plain: str, kind: str, tmp_path: Path,
    calibration_tokenizer: PreTrainedTokenizerFast, calibration_chat_tokenizer: PreTrainedTokenizerFast,
) -> None:  # fmt: skip
    path = tmp_path / f"rows.{'json' if kind == 'array' else kind}"
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), path)
    elif kind == "array":
        path.write_text(json.dumps([row, row], indent=1), encoding="utf-8")
    else:
        path.write_text((json.dumps(row) + "\n\n") * 2, encoding="utf-8")
    for tokenizer, text in ((calibration_chat_tokenizer, rendered), (calibration_tokenizer, plain), (None, plain)):
        assert read_source(str(path), tokenizer=tokenizer) == Documents("rows", (text, text))
    assert read_source(str(path), limit_characters=1).texts == (plain,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"id": 1, "title": "x"}',
            r"row 1 has no text that is understood. Found the fields id, title; understood: text,",
        ),
        ('{"text": 1}', r"row 1: `text` should be a string. Found int \(1\)"),
        ("[1, 2]", "row 1 should be an object"),
        ('{"text": "a"}\n{"text"', "line 2 should be one JSON object"),
        ('{"messages": [{"who": "me"}]}', "each message should have role and content"),
        ('{"messages": [{"role": "stranger", "content": "x"}]}', "chat template refused"),
        ('{"text": "  "}\n{"text": ""}', "is empty"),
        ("", "is empty"),
        (b'{"text": "\xff"}', "UTF-8"),
    ],
)
def test_bad_rows_are_named(
    content: str | bytes, message: str, tmp_path: Path, calibration_chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CalibrationError, match=message):
        read_source(str(path), tokenizer=calibration_chat_tokenizer)


def test_bad_sources_are_named(tmp_path: Path) -> None:
    for name in ("missing.txt", "missing.jsonl", "./missing", "a/b/c"):
        with pytest.raises(CalibrationError, match="there is no file at"):
            read_source(name)
    for suffix, message in ((".csv", "should end in one of"), (".txt", "UTF-8"), (".parquet", "a parquet file")):
        path = tmp_path / f"file{suffix}"
        path.write_bytes(b"\xff\xfe\xfa")
        with pytest.raises(CalibrationError, match=message):
            read_source(str(path))
    with pytest.raises(CalibrationError, match=r"TextSource\(name, \[text\]\)"):
        read_source("Once upon a time\nthere was")
    with pytest.raises(CalibrationError, match="Found an empty one"):
        read_source("")
    with pytest.raises(CalibrationError, match="is empty"):
        read_source(TextSource("a", [" \n"]))
    with pytest.raises(CalibrationError, match="needs `model` and `tokenizer`"):
        read_source("self")
    with pytest.raises(CalibrationError, match="0 <= k < n"):
        read_source("python", part=(3, 3))


@pytest.mark.parametrize(
    ("source", "called"),
    [
        ("wikitext", ("wikitext", None, "train")),
        ("owner/name:en", ("owner/name", "en", "train")),
        ("owner/name:test", ("owner/name", None, "test")),
        ("owner/name:en:validation", ("owner/name", "en", "validation")),
    ],
)
def test_data_sets_are_streamed(source: str, called: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> object:
        calls.append((name, config, split))
        assert streaming
        return ({"text": "x" * 10} for _ in iter(int, 1))

    monkeypatch.setattr("datasets.load_dataset", load)
    documents = read_source(source, limit_characters=35)
    assert calls == [called] and documents.texts == ("x" * 10,) * 4
    assert documents.name == called[0].rsplit("/", 1)[-1]


def test_a_data_set_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> object:
        raise ConnectionError("offline")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(CalibrationError, match=r"'pyhton' is no file.*offline.*`python` or `self`"):
        read_source("pyhton")
    with pytest.raises(CalibrationError, match=r"name\[:config\]\[:split\]"):
        read_source("a:b:c:d")


def test_python_is_prose_and_code_in_disjoint_parts() -> None:
    roles = {
        role: [read_source("python", part=(k, 3))] for k, role in enumerate(("calibration", "selection", "report"))
    }
    refuse_overlap(roles)
    assert all(sum(map(len, documents[0].texts)) > 300_000 for documents in roles.values())
    prose, code = read_source("python:prose", part=(0, 3)), read_source("python:code", part=(0, 3))
    assert set(roles["calibration"][0].texts) <= {*prose.texts, *code.texts}
    assert set(prose.texts) <= set(roles["calibration"][0].texts)
    assert read_source("python", part=(0, 3)) == roles["calibration"][0]
    assert len(read_source("python:code", limit_characters=10).texts) == 1
    with pytest.raises(CalibrationError, match="overlap"):
        refuse_overlap({"calibration": [read_source("python")], "report": [prose]})


def paragraphs(first: int, count: int) -> str:
    """Paragraphs of more than 80 characters, a line each."""
    return "\n\n".join(calibration_prose(1000 + first + k, 24).replace("\n", " ") for k in range(count))


def test_overlap_is_refused_with_both_names() -> None:
    base = Documents("web", (paragraphs(0, 50), paragraphs(50, 50)))
    refuse_overlap(
        {"calibration": [base], "report": [Documents("wiki", (paragraphs(100, 40) + "\n\n" + paragraphs(0, 2),))]}
    )
    shared = Documents("wiki", (paragraphs(100, 40) + "\n\n" + paragraphs(7, 3).replace(" ", "  "),))
    with pytest.raises(CalibrationError) as error:
        refuse_overlap({"calibration": [base], "selection": [], "report": [shared]})
    first = paragraphs(7, 1)[:80]
    for part in (
        "calibration source 'web'",
        "report source 'wiki'",
        "share 3 paragraphs",
        repr(first),
        "another source",
    ):
        assert part in str(error.value)
    refuse_overlap({"calibration": [base, shared]})
    few = Documents("few", (paragraphs(0, 3) + "\n\n" + paragraphs(200, 400),))
    refuse_overlap(
        {"calibration": [Documents("big", (paragraphs(0, 3) + "\n\n" + paragraphs(700, 400),))], "report": [few]}
    )


def test_one_identical_document_is_refused() -> None:
    same = calibration_prose(5, 24)
    one = Documents("a", (same, *(paragraphs(k, 1) for k in range(300))))
    two = Documents("b", (same + "\n", *(paragraphs(400 + k, 1) for k in range(300))))
    with pytest.raises(CalibrationError, match="overlap"):
        refuse_overlap({"selection": [one], "report": [two]})
    wrapped = "\n".join(
        ["a line that is short", "and another one like it", "and a third one", "and more words of it"] * 2
    )
    with pytest.raises(CalibrationError, match="overlap"):
        refuse_overlap({"selection": [Documents("a", (wrapped,))], "report": [Documents("b", (wrapped,))]})


def test_self_leaves_random_state_and_training_flags_alone(
    calibration_model: LlamaForCausalLM, calibration_tokenizer: PreTrainedTokenizerFast
) -> None:
    calibration_model.train()
    calibration_model.lm_head.eval()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    options = {"model": calibration_model, "tokenizer": calibration_tokenizer, "self_tokens": 300}
    first, again, other = (read_source("self", seed=seed, **options) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert calibration_model.training and not calibration_model.lm_head.training
    assert first == again != other
    blocks = calibration_blocks(["self"], calibration_tokenizer, samples=4, sequence_length=16, model=calibration_model)
    assert len(blocks) == 4 and blocks.domains == ("self",)


def test_self_without_start_token_begins_at_random(calibration_model: LlamaForCausalLM) -> None:
    tokenizer = calibration_make_tokenizer(unk_token="<unk>")
    documents = read_source("self", model=calibration_model, tokenizer=tokenizer, limit_characters=200)
    assert len({text[:1] for text in documents.texts}) > 1
    assert not any("<unk>" in text for text in documents.texts)


def test_eval_mode_comes_back_after_an_exception(calibration_model: LlamaForCausalLM) -> None:
    calibration_model.train()
    with pytest.raises(KeyError), eval_mode(calibration_model):
        assert not any(module.training for module in calibration_model.modules())
        raise KeyError
    assert all(module.training for module in calibration_model.modules())


# -- names ------------------------------------------------------------------------------------------------------------


def test_names_are_distinct_and_the_first_of_one_is_as_it_was() -> None:
    assert distinct_names(["dev", "test", "dev", "dev"]) == ["dev", "test", "dev-2", "dev-3"]
    assert distinct_names(["dev", "dev", "dev-2", "dev-3"]) == ["dev", "dev-2", "dev-2-2", "dev-3"]
    assert distinct_names([]) == []


def test_sources_of_one_stem_are_several(calibration_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    paths = [tmp_path / folder / "test.txt" for folder in ("wiki", "c4")]
    for number, path in enumerate(paths):
        path.parent.mkdir()
        path.write_text(calibration_prose(number, 600))
    sources = [str(path) for path in paths]
    blocks = calibration_blocks(sources, calibration_tokenizer, samples=4, sequence_length=16)
    reports = report_texts(text_model(), calibration_tokenizer, sources)
    assert list(blocks.domains) == list(reports) == ["test", "test-2"]
    alone = [report_texts(text_model(), calibration_tokenizer, source)["test"].digest for source in sources]
    assert [own.digest for own in reports.values()] == alone and alone[0] != alone[1]
