"""Prompts: the rules of each format, files and their faults, and the CSVs that every later stage reads."""

import csv
import dataclasses
import gzip
import json
import os
import sys
import types
from pathlib import Path

import pytest

import dataset_preprocess
from tests.paper_base_for_tests import build_tokenizer
from utils import data
from utils.cli import run
from utils.config import REPOSITORY, load_config
from utils.errors import DataError
from utils.rows import describe_source, iter_rows, read_rows
from utils.specs import SourceSpec
from utils.text_formats import (
    FORMATS,
    RowDropped,
    fill,
    first_response,
    last_turn,
    prompt_hash,
    reward_text,
    shown_to_reference,
)

REAL = Path(os.environ.get("MAVIS_TEST_DATA") or REPOSITORY.parent / "shared" / "data")
real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data in {REAL} (set MAVIS_TEST_DATA)")

DIALOGUE, INSTRUCTION = FORMATS["dialogue"], FORMATS["instruction"]
HEAD = "### Instruction: Generate a one-sentence summary of this post. ### Input: "


class Words:
    """A tokenizer whose tokens are words; `closes` makes it put EOS after a text, as some do."""

    eos_token, eos_token_id, bos_token_id = "</s>", 2, None

    def __init__(self, closes=False):
        self.closes = closes

    def __call__(self, texts):
        assert isinstance(texts, list)
        return {"input_ids": [[3 + len(w) for w in t.split()] + [2] * self.closes for t in texts]}


def hh(user, answer="Yes.", more=""):
    return {"chosen": f"\n\nHuman: {user}\n\nAssistant: {answer}{more}", "rejected": "x"}


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.delenv("DATA_DIR", raising=False)
    monkeypatch.delenv("MAVIS_CONFIG", raising=False)
    return load_config("configs/paper_7b.yaml", tmp_path / "workspace")


@pytest.fixture
def anthropic(config):
    return config.dataset("anthropic")


@pytest.fixture
def summary(config):
    return config.dataset("summary")


# ----------------------------------------------------------------------------------------------------------- formats


def test_a_dialogue_prompt_ends_with_the_first_assistant_marker():
    row = hh("Hi, who are you?", "A program.", "\n\nHuman: And now?\n\nAssistant: Still one.")
    assert DIALOGUE.prompt_of_row(row) == "\n\nHuman: Hi, who are you?\n\nAssistant: "
    assert DIALOGUE.response_of_row(row) == "A program."
    assert DIALOGUE.user_of_prompt(DIALOGUE.prompt_of_row(row)) == "Hi, who are you?"


def test_a_dialogue_is_cut_at_the_first_marker_even_inside_the_users_words():
    row = hh("You write Assistant: before it", "Yes")
    assert DIALOGUE.prompt_of_row(row) == "\n\nHuman: You write Assistant: "
    assert DIALOGUE.user_of_prompt(DIALOGUE.prompt_of_row(row)) == "You write"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "\n\nHuman: nobody answers"}, "no assistant turn"),
        ({"chosen": "\n\nHuman: \n\nAssistant: what?"}, "empty text"),
        ({"chosen": None}, "empty text"),
        ({"chosen": float("nan")}, "empty text"),
        ({"prompt": "  "}, "empty text"),
        ({"text": "x"}, "no usable column"),
        ({"chosen": "\n\nHuman: half \ud800 a pair\n\nAssistant: x"}, "not valid Unicode"),
    ],
)
def test_a_row_without_a_prompt_is_dropped_with_its_reason(row, reason):
    with pytest.raises(RowDropped, match=f"^{reason}$"):
        DIALOGUE.prompt_of_row(row)


def test_a_prompt_column_is_taken_and_gets_its_markers():
    given = "\n\nHuman: Hello\n\nAssistant: "
    assert DIALOGUE.prompt_of_row({"prompt": given, "chosen": "ignored"}) == given
    assert DIALOGUE.prompt_of_row({"prompt": "Hello"}) == given
    assert INSTRUCTION.prompt_of_row({"prompt": f"{HEAD}A post ### Response: "}) == f"{HEAD}A post ### Response: "


def test_a_response_comes_from_whichever_column_holds_it():
    assert DIALOGUE.response_of_row({"prompt": "Hello", "chosen": "Hi there", "rejected": "No"}) == "Hi there"
    assert DIALOGUE.response_of_row({"prompt": "Hello", "response": " Hi "}) == "Hi"
    assert INSTRUCTION.response_of_row({"post": "p", "reference_responses": " A dog. "}) == "A dog."
    rated = {"info": {"post": "p"}, "summaries": [{"text": " first"}, {"text": " second"}], "choice": 1}
    assert INSTRUCTION.response_of_row(rated) == "second"
    with pytest.raises(RowDropped, match="empty response"):
        DIALOGUE.response_of_row(hh("Hello", "\n\nHuman: are you there?"))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "text", ["What is rust?", " two  spaces ", "Human rights: a list", "{user} {0} %s", "é\u2028ü"]
)
def test_the_users_text_survives_wrapping_and_wrapping_twice_changes_nothing(name, text):
    fmt = FORMATS[name]
    prompt = fmt.wrap_user(text)
    assert fmt.user_of_prompt(prompt) == text.strip()
    assert fmt.wrap_user(prompt) == prompt
    assert fmt.user_of_prompt(text) == text.strip()  # no markers: the text itself


@pytest.mark.parametrize("name", FORMATS)
def test_an_empty_text_cannot_be_wrapped(name):
    with pytest.raises(ValueError, match="empty"):
        FORMATS[name].wrap_user(" \n")


def test_a_post_is_found_in_each_kind_of_row_and_its_newlines_become_spaces():
    wanted = f"{HEAD}First line  second: TL;DR: none ### Response: "
    post = "First line\n\nsecond: TL;DR: none"
    assert INSTRUCTION.prompt_of_row({"info": {"post": post, "title": "t"}}) == wanted
    assert INSTRUCTION.prompt_of_row({"post": post.replace("\n\n", "\r\n\n")}) == wanted
    query = f"SUBREDDIT: r/x\n\nTITLE: My POST: a title\n\nPOST: {post}\n\nTL;DR:"
    assert INSTRUCTION.prompt_of_row({"query": query}) == wanted
    assert INSTRUCTION.user_of_prompt(wanted) == "First line  second: TL;DR: none"


@pytest.mark.parametrize(
    "row", [{"info": {"post": None, "article": "news"}}, {"query": "TITLE: x\n\nTL;DR:"}, {"post": ""}]
)
def test_a_row_without_a_post_is_dropped(row):
    with pytest.raises(RowDropped, match="no post"):
        INSTRUCTION.prompt_of_row(row)


def test_turns_of_a_dialogue():
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
    assert first_response(text) == "b"
    assert last_turn(text) == ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: ", "d")
    assert first_response("no turns") == ""
    with pytest.raises(RowDropped):
        last_turn("no turns")


def test_templates_are_filled_in_one_pass(anthropic):
    fields = dict(prompt="P{response}", user="U", shown="S", response="R{bos}", bos=None, eos="</s>")
    assert reward_text("{prompt}|{response}|{bos}|{eos}|{user}|{shown}", **fields) == "P{response}|R{bos}||</s>|U|S"
    with pytest.raises(ValueError, match=r"unknown field \{respons\}; did you mean 'response'"):
        reward_text("{respons}", **fields)
    assert fill("a { b } {}", x="1") == "a { b } {}"
    chat = dataclasses.replace(anthropic, reference_template="<u>{user}</u>{prompt}")
    assert shown_to_reference(chat, DIALOGUE.wrap_user("Hi")) == "<u>Hi</u>\n\nHuman: Hi\n\nAssistant: "


@pytest.mark.parametrize(("text", "ids"), [("<s> hi", [1, 5]), ("hi", [1, 5]), ("<s> <s> hi", [1, 1, 5]), ("", [1])])
def test_a_template_that_begins_with_what_the_tokenizer_puts_first_has_it_once(text, ids):
    """Most chat templates write out the beginning-of-sequence token, and most tokenizers add one."""

    class Tokenizer:
        bos_token_id, eos_token_id, eos_token = 1, None, None

        def __call__(self, texts):
            return {"input_ids": [[1, *({"<s>": 1, "hi": 5}[word] for word in text.split())] for text in texts]}

    assert data.tokenize_prompts(Tokenizer(), [text]) == [ids]


def test_the_hash_is_of_the_users_words_alone():
    text = "What is  Rust?"
    assert prompt_hash(text) == prompt_hash(DIALOGUE.wrap_user(text)) == prompt_hash(INSTRUCTION.wrap_user(text))
    assert prompt_hash(text) == prompt_hash("what is rust? ") != prompt_hash("what is dust?")
    assert prompt_hash("Human: a") == prompt_hash(DIALOGUE.wrap_user("Human: a"))
    assert prompt_hash("") == 0xE3B0C44298FC / 2**48  # the start of sha256 of nothing: the same on every machine
    hashes = [prompt_hash(f"prompt {i}") for i in range(2000)]
    assert all(0 <= h < 1 for h in hashes)
    assert abs(sum(h < 0.85 for h in hashes) / 2000 - 0.85) < 0.04  # 5 standard errors


# ------------------------------------------------------------------------------------------------------------- rules


def test_limits_of_tokens_are_inclusive(anthropic):
    spec = dataclasses.replace(anthropic, min_prompt_tokens=4, max_prompt_tokens=6)  # "Human:" and "Assistant:" count
    rows = [hh(" ".join("abcdefg"[:n])) for n in range(1, 7)]
    prompts, counts = data.build_prompts(spec, rows, Words())
    assert [len(p.split()) for p in prompts] == [4, 5, 6]
    assert counts == {"rows read": 6, "fewer than 4 tokens": 1, "more than 6 tokens": 2, "kept": 3}


def test_limits_of_characters_are_exclusive(summary):
    spec = dataclasses.replace(summary, min_post_chars=3, max_post_chars=6)
    prompts, counts = data.build_prompts(spec, [{"post": "x" * n} for n in range(2, 8)], Words())
    assert [INSTRUCTION.user_of_prompt(p) for p in prompts] == ["xxxx", "xxxxx"]
    assert counts["not more than 3 characters"] == counts["not fewer than 6 characters"] == 2


def test_every_row_is_kept_or_counted_under_one_reason_in_order(anthropic, monkeypatch):
    monkeypatch.setattr(data, "TOKENIZER_BATCH", 3)  # so that batches end in the middle
    rows = [
        hh("a"),
        hh("b"),
        {"chosen": "no turns"},
        hh("a", "Another answer."),
        hh("c " * 300),
        hh("d"),
        {"chosen": ""},
    ]
    prompts, counts = data.build_prompts(anthropic, rows, Words())
    assert prompts == [DIALOGUE.wrap_user(u) for u in "abd"]
    assert list(counts.items()) == [
        ("rows read", 7),
        ("empty text", 1),
        ("no assistant turn", 1),
        ("duplicate prompt", 1),
        ("more than 200 tokens", 1),
        ("kept", 3),
    ]


def test_hash_ranges_share_the_prompts_out(anthropic):
    rows = [hh(f"question {i}") for i in range(200)]
    low, counts = data.build_prompts(anthropic, rows, Words(), hash_range=(0.0, 0.85))
    high, _ = data.build_prompts(anthropic, rows, Words(), hash_range=(0.85, 1.0))
    assert not set(low) & set(high) and len(low) + len(high) == 200 and low and high
    assert counts["in another split's share"] == len(high)
    share = SourceSpec(hash_range=(0.85, 1.0))
    assert all(data.in_hash_range(p, share) for p in high) and not any(data.in_hash_range(p, share) for p in low)


def test_nothing_kept_says_why(anthropic):
    with pytest.raises(DataError, match=r"no prompt of anthropic is left of 2 rows \(2 no assistant turn\)"):
        data.build_prompts(anthropic, [{"chosen": "x"}] * 2, Words())
    with pytest.raises(DataError, match="the source is empty"):
        data.build_prompts(anthropic, [], Words())
    with pytest.raises(DataError, match="the rows have 'text', 'humor'; expected one of chosen, prompt"):
        data.build_prompts(anthropic, [{"text": "x", "humor": "True"}], Words())


# ------------------------------------------------------------------------------------------------------------- files

ROWS = [{"chosen": 'é\n"quoted", line', "rejected": "\u2028 y"}, {"chosen": "b\r\nc", "rejected": ""}]


def write_rows(path: Path, rows=ROWS) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if kind == "csv":
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        elif kind == "json":
            json.dump(rows, file, indent=1)
        else:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "A.CSV.gz", "a.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    assert list(read_rows(write_rows(tmp_path / name))) == ROWS


def test_json_with_one_object_per_line_is_read(tmp_path):
    file = write_rows(tmp_path / "a.jsonl").rename(tmp_path / "a.json")
    assert list(read_rows(file)) == ROWS


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    (tmp_path / "a.csv").write_bytes("\ufeffprompt\nx\n".encode())
    assert list(read_rows(tmp_path / "a.csv")) == [{"prompt": "x"}]


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "a.jsonl, line 2: expected an object with named columns, got list"),
        ("a.jsonl", b'{"a": 1}\n\xff\xfe\n', "a.jsonl, after line . not UTF-8 text"),
        ("a.jsonl.gz", b'{"a": 1}\n', "not a gzip file, though its name ends in .gz"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999)[:-9], "after line [0-9]+: damaged or cut gzip"),
        ("a.json", b'[{"a": 1},\n{"a": }]', "a.json, line 2: not JSON"),
        ("a.json", b"[1]", "a.json, entry 0: expected an object"),
        ("a.csv", b"", "a.csv: empty file"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "a.csv, line 3: more than the 2 cells"),
        ("a.csv", b'a,b\n1,"2"x\n', "a.csv, line 2: not CSV"),
        ("a.csv.gz", gzip.compress(b"a,b\n" + b"1,2\n" * 999)[:-9], "damaged or cut gzip"),
        ("a.parquet", b"PAR1 not really", "not a readable parquet file"),
        ("a.txt", b"x", "cannot read this kind of file"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message.replace("line .", "line [0-9]+:")) as caught:
        list(read_rows(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_folder_stands_for_the_files_of_the_split(tmp_path):
    for part in ("harmless", "helpful"):
        (tmp_path / part).mkdir()
        write_rows(tmp_path / part / "train.jsonl.gz", [{"chosen": part}])
        write_rows(tmp_path / part / "test.jsonl.gz", [{"chosen": "test"}])
    assert [r["chosen"] for r in read_rows(tmp_path, "train")] == ["harmless", "helpful"]
    with pytest.raises(DataError, match="begins with 'validation'"):
        list(read_rows(tmp_path, "validation"))


def test_local_files_are_looked_for_in_data_dir_then_in_the_workspace(config, tmp_path, monkeypatch):
    source = SourceSpec(hub="a/b", files=("x/one.jsonl",))
    (config.workspace / "x").mkdir(parents=True)
    write_rows(config.workspace / "x" / "one.jsonl", [{"chosen": "workspace"}])
    assert list(iter_rows(source, config)) == [{"chosen": "workspace"}]
    (tmp_path / "elsewhere" / "x").mkdir(parents=True)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "elsewhere"))
    assert list(iter_rows(source, config)) == [{"chosen": "workspace"}]
    write_rows(tmp_path / "elsewhere" / "x" / "one.jsonl", [{"chosen": "data dir"}])
    assert list(iter_rows(source, config)) == [{"chosen": "data dir"}]
    given = write_rows(tmp_path / "given.csv", [{"chosen": "given"}])
    assert list(iter_rows(source, config, [given])) == [{"chosen": "given"}]
    with pytest.raises(DataError, match="no data file y.jsonl in"):
        list(iter_rows(SourceSpec(hub="a/b", files=("x/one.jsonl", "y.jsonl")), config))
    with pytest.raises(DataError, match="no data file y.jsonl in"):
        list(iter_rows(SourceSpec(files=("y.jsonl",)), config))
    with pytest.raises(DataError, match="no data file 'nope.csv'"):
        list(iter_rows(source, config, ["nope.csv"]))


def test_the_hub_is_asked_where_there_are_no_files(config, monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        if args[0] == "scripted/set":
            raise RuntimeError("Dataset scripts are no longer supported, but found set.py")
        if args[0] == "gone/set":
            raise ConnectionError("Couldn't reach\nthe Hub")
        return [{"chosen": "hub"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    source = SourceSpec(hub="a/b", hub_data_dir="part", split="test", files=("nowhere.jsonl",))
    assert list(iter_rows(source, config)) == [{"chosen": "hub"}]
    assert calls == [(("a/b",), {"data_dir": "part", "split": "test"})]
    calls.clear()
    source = SourceSpec(hub="scripted/set", hub_config="comparisons", split="validation")
    assert list(iter_rows(source, config)) == [{"chosen": "hub"}]
    files = "hf://datasets/scripted/set@refs%2Fconvert%2Fparquet/comparisons/validation/*.parquet"
    assert calls[1] == (("parquet",), {"data_files": files, "split": "train"})
    with pytest.raises(DataError, match=r"cannot load gone/set \(train\) from the Hub \(ConnectionError"):
        list(iter_rows(SourceSpec(hub="gone/set"), config))


# ----------------------------------------------------------------------------------------------------------- the CSV

AWKWARD = ['\n\nHuman: a, "b"\n\nAssistant: ', " NA", "nan", "x\r\ny\rz", "\u2028 ü", "null", '"', "'=1+1"]


def test_prompts_come_back_as_they_were_written(tmp_path):
    file = tmp_path / "d" / "p.csv"
    data.write_prompts(file, AWKWARD)
    assert data.read_prompts(file) == AWKWARD
    assert [f.name for f in file.parent.iterdir()] == ["p.csv"]


def test_an_interrupted_write_leaves_the_old_file_and_no_rest(tmp_path):
    file = tmp_path / "p.csv"
    data.write_prompts(file, ["old"])

    def prompts():
        yield "new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.write_prompts(file, prompts())
    assert data.read_prompts(file) == ["old"]
    assert [f.name for f in tmp_path.iterdir()] == ["p.csv"]


def test_a_missing_prompts_file_names_the_command_that_makes_it(config, anthropic):
    file = data.prompts_csv(config, anthropic, "test")
    assert file == config.workspace / "datasets" / "anthropic" / "anthropic_test_deduped.csv"
    command = r"make it with: python dataset_preprocess.py anthropic --split test --config .*paper_7b.yaml"
    with pytest.raises(DataError, match=command):
        data.read_prompts(file, config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text\nx\n", "no column 'prompt'; the columns are 'text'"),
        ("prompt\n", "no prompt in this file"),
        ('prompt\nx\n" "\n', "prompt 1 is empty"),
        ("prompt,n\nx,1\n,2\n", "prompt 1 is empty"),
    ],
)
def test_an_unusable_prompts_file_is_refused(tmp_path, text, message):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        data.read_prompts(tmp_path / "p.csv")


def test_encoding_names_the_prompt_that_does_not_fit(anthropic):
    prompts = [DIALOGUE.wrap_user("a"), DIALOGUE.wrap_user("a b c")]
    assert [len(ids) for ids in data.encode_prompts(anthropic, Words(), prompts)] == [3, 5]
    assert data.encode_prompts(anthropic, Words(), prompts, max_context=5) == data.encode_prompts(
        anthropic, Words(), prompts
    )
    with pytest.raises(DataError, match="prompt 1 has 5 tokens and at most 4 fit"):
        data.encode_prompts(anthropic, Words(), prompts, max_context=4)
    with pytest.raises(DataError, match="prompt 1 is empty"):
        data.encode_prompts(anthropic, Words(), [prompts[0], "\n\nHuman: \n\nAssistant: "])
    assert data.encode_prompts(anthropic, Words(), []) == []


def test_a_prompt_never_ends_with_the_tokenizers_own_eos(anthropic):
    prompts = [DIALOGUE.wrap_user("a b")]
    closed, open_ = (data.encode_prompts(anthropic, Words(closes), prompts) for closes in (True, False))
    assert closed == open_


# ---------------------------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return str(folder)


def preprocess(*arguments) -> int:
    return run(lambda: dataset_preprocess.main([str(a) for a in arguments]))


def test_the_published_command_makes_the_csv(config, tmp_path, tokenizer_folder, capsys):
    file = write_rows(tmp_path / "hh.jsonl.gz", [hh("What is rust?"), hh("What is rust?", "Iron."), hh("And steel?")])
    given = ("--workspace", config.workspace, "--data_files", file, "--tokenizer", tokenizer_folder)
    assert preprocess("anthropic", "--split=train", *given) == 0
    out = capsys.readouterr().out
    csv_file = config.workspace / "datasets/anthropic/anthropic_train_deduped.csv"
    assert data.read_prompts(csv_file) == [DIALOGUE.wrap_user("What is rust?"), DIALOGUE.wrap_user("And steel?")]
    assert "3  rows read" in out and "1  duplicate prompt" in out and "2  kept" in out and str(csv_file) in out
    first = csv_file.read_bytes()
    assert preprocess("assistant", "--split", "train", *given) == 0  # by its exp_type, and the same bytes again
    assert csv_file.read_bytes() == first
    assert preprocess("anthropic", "--split=test", *given, "--output_dir", tmp_path / "out") == 0
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["anthropic_test_deduped.csv"]


def test_dry_run_makes_nothing(config, tmp_path, capsys):
    file = write_rows(tmp_path / "hh.jsonl.gz", [hh("a")])
    assert preprocess("anthropic", "--workspace", config.workspace, "--data_files", file, "--dry_run") == 0
    assert str(file) in capsys.readouterr().out
    assert not config.workspace.exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["antropic"], 2, "did you mean 'anthropic'"),
        (["anthropic", "--split", "tset"], 2, "has no split 'tset'; did you mean 'test'"),
        (["anthropic", "--data_files", "gone.jsonl"], 1, "no data file 'gone.jsonl'"),
        (["anthropic", "--data_files", "{bad}"], 1, "line 2: not JSON"),
        (["anthropic", "--data_files", "{humor}"], 1, "no usable column"),
        (["summary", "--data_files", "{hh}"], 1, "no usable column"),
    ],
)
def test_bad_input_ends_in_one_line_and_a_failing_status(
    config, tmp_path, tokenizer_folder, capsys, arguments, status, message
):
    (tmp_path / "bad.jsonl").write_text('{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b"}\n{"chosen"\n')
    files = {
        "bad": tmp_path / "bad.jsonl",
        "humor": write_rows(tmp_path / "humor.csv", [{"text": "x", "humor": "True"}]),
        "hh": write_rows(tmp_path / "hh.jsonl", [hh("a")]),
    }
    arguments = [a.format(**files) for a in arguments]
    assert preprocess(*arguments, "--workspace", config.workspace, "--tokenizer", tokenizer_folder) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not list(config.workspace.rglob("*.csv"))


# ---------------------------------------------------------------------------------------------------------- real data


@real_data
def test_real_dialogues_give_disjoint_prompts_with_responses(config, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(REAL))
    small = load_config("smollm")
    spec = small.dataset("anthropic")
    prompts = {}
    for split, source in spec.splits.items():
        assert describe_source(source, small).startswith(str(REAL))
        rows = list(iter_rows(source, small))
        assert len(rows) == 2354 + 2312
        prompts[split], counts = data.build_prompts(spec, rows, Words(), hash_range=source.hash_range)
        assert sum(n for reason, n in counts.items() if reason != "rows read") == len(rows)
        assert len(set(prompts[split])) == len(prompts[split]) == counts["kept"]
    users = {split: {DIALOGUE.user_of_prompt(p) for p in kept} for split, kept in prompts.items()}
    assert not users["train"] & users["test"]
    assert len(users["train"]) > 3000 and len(users["test"]) > 500
    for prompt in prompts["test"]:
        user = DIALOGUE.user_of_prompt(prompt)
        assert user and DIALOGUE.user_of_prompt(DIALOGUE.wrap_user(user)) == user
    responses = [DIALOGUE.response_of_row(row) for row in rows if first_response(row["chosen"])]
    assert len(responses) > 4600 and not any("\n\nHuman: " in r for r in responses)


@real_data
def test_real_posts_pass_the_published_limits(config, summary, tmp_path):
    rows = list(iter_rows(SourceSpec(), config, [REAL / "tldr" / "oai1b.csv.gz"]))
    assert len(rows) == 1945
    prompts, counts = data.build_prompts(summary, rows, Words())
    assert counts["kept"] > 500
    for prompt in prompts:
        assert prompt.startswith(HEAD) and prompt.endswith(" ### Response: ") and "\n" not in prompt
        assert 100 < len(INSTRUCTION.user_of_prompt(prompt)) < 1200
        assert "SUBREDDIT:" not in prompt and not prompt.rstrip().endswith("TL;DR:")
    assert all(INSTRUCTION.response_of_row(row) for row in rows)
    data.write_prompts(tmp_path / "p.csv", prompts)
    assert data.read_prompts(tmp_path / "p.csv") == prompts


@real_data
def test_the_script_reads_real_files_with_a_real_tokenizer(config, capsys):
    given = ("--workspace", config.workspace, "--tokenizer", REAL / "stories260K")
    assert preprocess("anthropic", "--split=test", *given, "--data_files", REAL / "hh/helpful-base.test.jsonl.gz") == 0
    assert "2,354  rows read" in capsys.readouterr().out
    assert len(data.read_prompts(config.workspace / "datasets/anthropic/anthropic_test_deduped.csv")) > 2000
