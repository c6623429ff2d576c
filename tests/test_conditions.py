"""Attributes: from a data folder to rows of numbers and back, through headers, command lines and the scripts."""

from __future__ import annotations

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import TINY_UNET, run, run_any
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_modules import ABAR, tiny_diffusion
from test_pipeline import images

from conditions import (
    GROUP,
    PERCENTS,
    Attribute,
    category,
    draw_rows,
    encode_rows,
    from_header,
    in_words,
    learn_attribute,
    network_conditions,
    parse_sweep,
    parse_values,
    to_header,
)
from config import DataConfig, TrainConfig
from dataset import load_splits, read_images
from modules import invert, make_grid, sample
from train import learn_attributes
from utils import UserError
from weights import read_meta, weights_digest

AGES = [str(a) for a in range(55, 91)]
AGE = learn_attribute("age", AGES)
SEX = learn_attribute("sex", ["F", "M", "F", "n/a", " F ", ""])
BOTH = [AGE, SEX]


def known_by_phantoms(folder: Path) -> dict[str, dict[str, str]]:
    return {r["file"]: r for r in csv.DictReader((folder / "attributes.csv").read_text().splitlines())}


# ---------------------------------------------------------------------------------------------------------------------
# Learning, encoding, drawing


def test_what_is_a_number_and_what_a_category():
    assert AGE.values == () and AGE.unit == "years" and AGE.quantiles == tuple(np.percentile(range(55, 91), PERCENTS))
    ends = learn_attribute("age", ["56.4", "70", "86.3"]).quantiles
    assert (ends[0], ends[-1]) == (56, 87)  # rounded outwards: nobody's own
    assert SEX.values == ("F", "M") and SEX.shares == (0.75, 0.25) and str(SEX) == "sex F, M"
    assert str(AGE) == "age 55 to 90 years"
    assert learn_attribute("diagnosed", ["0", "1", "0"]).values == ("0", "1")  # two numbers are a code
    assert learn_attribute("stage", ["0", "0.5", "1", "N/A"]).quantiles[-1] == 1
    assert learn_attribute("site", ["2", "3", "4", "x"]).values == ("2", "3", "4", "x")
    assert learn_attribute("field", ["3", "3.0", "1.5", "1.50"]).values == ("1.5", "3")  # two numbers, however spelt
    assert learn_attribute("field", ["3", "1.5"]).encode_all(["3.0", "1.50"]).tolist() == [1, 0]
    assert learn_attribute("group", ["0", "1", "2"]).values == ("0", "1", "2")  # groups are no numbers
    apoe = learn_attribute("apoe", ["3/3", "3/4", "4/4", "3/3"])
    assert from_header({"attributes": to_header([apoe])}, [3]) == [apoe]


@pytest.mark.parametrize(
    ("texts", "word"),
    [
        ([], "differ"),
        (["3", "3.0"], "differ"),
        (["n/a", ""], "differ"),
        (["7", "7"], "differ"),
        ([f"p{i}" for i in range(65)], "65"),
    ],
)
def test_what_cannot_be_learnt(texts: list[str], word: str):
    with pytest.raises(UserError, match=word):
        learn_attribute("thing", texts)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(-1e4, 1e4).map(lambda x: round(x, 2)), min_size=3, max_size=40, unique=True))
def test_numbers_there_and_back(numbers: list[float]):
    attribute = learn_attribute("x", [str(n) for n in numbers])
    codes = attribute.encode_all([str(n) for n in numbers])
    assert codes.dtype == np.float32 and -1.001 <= codes.min() < -0.75 and 0.75 < codes.max() <= 1.001
    spread = max(numbers) - min(numbers)
    for n in numbers:
        code = attribute.encode(str(n))
        assert float(attribute.decode(code)) == pytest.approx(n, rel=1e-3, abs=1e-3 * spread)


def test_unknown_and_other_peoples_values():
    assert all(math.isnan(a.encode(text)) for a in BOTH for text in ("unknown", "", "N/A"))
    assert np.isnan(SEX.encode_all(["X", "f"])).all() and AGE.encode_all(["55", "90", "107.5"]).tolist() == [-1, 1, 2]
    assert AGE.decode(math.nan) == SEX.decode(math.nan) == ""
    for attribute, text in ((AGE, "91"), (AGE, "old"), (AGE, "inf"), (SEX, "X")):
        with pytest.raises(UserError, match=f"{attribute.name}={text} is not among"):
            attribute.encode(text)


@pytest.mark.parametrize("name", ["class", "seed", "m/f", "a=b"])
def test_names_that_mean_something_else(name: str):
    with pytest.raises(UserError, match="cannot be called so"):
        learn_attribute(name, AGES)


def test_folders_may_be_called_whatever_they_are():
    group = category(GROUP, ["none", "tumor", "none"])
    assert group.encode("none") == 0 and group.encode("tumor") == 1 and math.isnan(group.encode("unknown"))
    assert draw_rows([group], {}, 0, range(3))[:, 0].tolist() == [0, 1, 0]


def test_draws_are_distributed_as_in_training_and_depend_on_seed_and_index():
    skewed = learn_attribute("age", [str(x) for x in np.random.default_rng(0).gamma(2, 5, 500) + 50])
    rows = draw_rows([skewed, SEX], {}, 3, range(4000))
    ages = np.array([float(skewed.decode(c)) for c in rows[:, 0].tolist()])
    for q in (5, 25, 50, 75, 95):
        assert (ages <= skewed.quantiles[q // 5]).mean() == pytest.approx(q / 100, abs=0.03)
    assert rows[:, 1].mean().item() == pytest.approx(0.25, abs=0.03)
    assert abs(np.corrcoef(rows.T.numpy())[0, 1]) < 0.05
    assert torch.equal(draw_rows([skewed, SEX], {}, 3, [7, 9]), rows[[7, 9]])
    fixed = draw_rows([skewed, SEX], {"age": 0.5}, 3, range(5))
    assert (fixed[:, 0] == 0.5).all() and torch.equal(fixed[:, 1], rows[:5, 1])  # what is set moves nothing else


def test_groups_take_turns():
    group = learn_attribute(GROUP, ["AD", "CN", "MCI"])
    assert draw_rows([AGE, group], {}, 0, range(5))[:, 1].tolist() == [0, 1, 2, 0, 1]


def test_rows_of_a_table():
    rows = encode_rows(BOTH, {"age": ["55", "", "72.5"], "sex": ["M", "F", "?"]}, 3)
    assert rows.dtype == torch.float32 and rows[0].tolist() == [-1, 1] and rows[2, 0] == 0
    assert rows.isnan().tolist() == [[False, False], [True, False], [False, True]]
    assert encode_rows(BOTH, {}, 2).isnan().all() and encode_rows([], {}, 2).shape == (2, 0)
    assert in_words(BOTH, rows[0].tolist()) == ["55", "M"] and network_conditions(BOTH) == [0, 2]


def test_the_header_gives_back_what_it_was_given():
    text = json.dumps(to_header(BOTH))
    assert from_header({"attributes": json.loads(text), "classes": ["all"]}, [0, 2]) == BOTH
    (old,) = from_header({"classes": ["AD", "NC"]}, [2])  # of before there were attributes
    assert old == Attribute("group", ("AD", "NC"), (0.5, 0.5)) and from_header({"classes": ["AD", "NC"]}, []) == []


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../x"}, {"name": 3}, {"values": "FM"}, {"values": ["F"]}, {"values": ["F", "F"]}, {"shares": [0, 0]},
        {"values": ["F", "a\nb"]}, {"shares": [10**400, 1]}, {"name": "class"}, {"shares": [0.5]},
        {"shares": [2, -1]}, {"shares": [1, math.nan]}, {"name": "age"},
    ],
)  # fmt: skip
def test_a_header_from_anywhere_is_refused(change: dict):
    age, sex = to_header(BOTH)
    with pytest.raises(ValueError):
        from_header({"attributes": [age, sex | change]}, [0, 2])
    for wrong in ([age], [age, 7], "x", [age | {"quantiles": [1] * 21}, sex], [age | {"quantiles": [2, 1]}, sex]):
        with pytest.raises(ValueError):
            from_header({"attributes": wrong}, [0, 2])


def test_values_and_sweeps_in_words():
    assert parse_values(["age=90", "sex=F"], BOTH, "r") == {"age": 1.0, "sex": 0.0}
    assert math.isnan(parse_values(["age=unknown"], BOTH, "r")["age"])
    place, codes = parse_sweep("age=60:65:2.5", BOTH, "r")
    assert place == 0 and [AGE.decode(c) for c in codes] == ["60", "62.5", "65"]
    assert parse_sweep("sex", BOTH, "r") == (1, [0.0, 1.0])
    for words in (["age"], ["age=60", "age=61"], ["size=3"], ["sex=X"]):
        with pytest.raises(UserError):
            parse_values(words, BOTH, "r")
    for word in (
        "age",
        "age=60",
        "age=60:50:1",
        "age=60:70:0",
        "age=60:70:x",
        "age=40:60:5",
        "sex=F:M:1",
        "size=1:2:1",
    ):
        with pytest.raises(UserError):
            parse_sweep(word, BOTH, "r")
    with pytest.raises(UserError, match="unconditional"):
        parse_values(["age=60"], [], "r")


# ---------------------------------------------------------------------------------------------------------------------
# What a data folder says


def write_slices(root: Path, names: list[str], label: str = "all", split: str = "train") -> None:
    (root / split / label).mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        image = np.random.default_rng(i).integers(1, 255, (40, 40), dtype=np.uint8)
        cv2.imwrite(str(root / split / label / f"{name}.png"), image)


def test_a_table_that_nobody_asks_for_stops_nobody(tmp_path: Path):
    write_slices(tmp_path, ["a_1", "b_1", "c_1"])
    (tmp_path / "attributes.csv").write_text("person,age\na,60\na,61\n")
    splits, _ = load_splits(DataConfig(data=str(tmp_path), cache=str(tmp_path / "cache"), val_fraction=0.3), 40)
    cfg = TrainConfig()
    assert (
        learn_attributes(cfg, splits["train"]) == []
        and learn_attributes(replace(cfg, unconditional=True), splits["train"]) == []
    )
    with pytest.raises(UserError, match="contradict"):
        learn_attributes(replace(cfg, condition=("age",)), splits["train"])


def test_images_of_one_class_know_it_and_no_level_is_guessed(tmp_path: Path):
    write_slices(tmp_path, ["s0i00000_0", "s0i00001_0"], "AD")
    data, _ = read_images(tmp_path)
    assert data.column("group") == ["AD", "AD"] and data.column("level") == ["", ""]
    (tmp_path / "attributes.csv").write_text("person,group,level\ns0i00000,NC,3\n")
    data, _ = read_images(tmp_path)
    assert data.column("group") == ["NC", "AD"] and data.column("level") == ["3", ""]


def columns(root: Path, *names: str) -> list[tuple[str, ...]]:
    splits, _ = load_splits(DataConfig(data=str(root), cache=str(root / "cache"), val_fraction=0.3), 40)
    rows = {}
    for data in splits.values():
        for file, *texts in zip(data.files, *(data.column(n) for n in names)):
            rows[file] = tuple(texts)
    return [rows[file] for file in sorted(rows)]


@pytest.mark.parametrize(
    "table",
    [
        "file,Age,sex\na_1.png,60,F\na_2.png,60,F\nb_1.png,71,M\nc_1.png,,\n",
        "scan,age,sex\na,60,F\nb,71,M\nelse,3,X\n",
        "patient, age ,sex\na,60,F\nb, 71 ,M\nc,,\n",
        "participant_id,age,sex\r\na,60,F\r\nb,71,M\r\n",
    ],
)  # fmt: skip
def test_attributes_by_file_scan_and_person(tmp_path: Path, table: str):
    write_slices(tmp_path, ["a_1", "a_2", "b_1", "c_1"])
    (tmp_path / "attributes.csv").write_text(table)
    assert columns(tmp_path, "age", "sex") == [("60", "F"), ("60", "F"), ("71", "M"), ("", "")]


def test_the_level_is_the_number_of_the_slice_unless_a_table_says_it(tmp_path: Path):
    write_slices(tmp_path, ["388206_78", "388206_79", "12_100", "x_y"])
    assert columns(tmp_path, "level") == [("100",), ("78",), ("79",), ("",)]
    (tmp_path / "attributes.csv").write_text("file,level\n388206_78.png,-4.5\n")
    assert columns(tmp_path, "level") == [("",), ("-4.5",), ("",), ("",)]


def test_the_group_is_the_folder_or_a_column_where_there_is_one_folder(tmp_path: Path):
    write_slices(tmp_path, ["a_1", "b_1", "c_1"])
    (tmp_path / "attributes.csv").write_text("person,group\na,ill\nb,well\n")
    assert columns(tmp_path, "group") == [("ill",), ("well",), ("",)]
    write_slices(tmp_path, ["d_1", "e_1"], "other")
    assert columns(tmp_path, "group") == [("all",)] * 3 + [("other",)] * 2


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("age,sex\n60,F\n", "needs a column that says what a row is about"),
        ("person,age\na,60\nb,1\na,61\n", "two rows about a that contradict"),
        ("person,age\n", "has no rows"),
        ("person,age\n\xff,60\n", "UTF-8"),
    ],
)
def test_a_table_that_cannot_be_meant(tmp_path: Path, table: str, words: str):
    write_slices(tmp_path, ["a_1", "b_1"])
    (tmp_path / "attributes.csv").write_bytes(table.encode("latin-1"))
    with pytest.raises(UserError, match=words):
        columns(tmp_path, "age")


# ---------------------------------------------------------------------------------------------------------------------
# The scripts


ALL = ["--condition", "level", "age", "sex", "group"]


@pytest.fixture(scope="module")
def conditional(trained: Path, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a run `tiny` whose U-Net knows level, age, sex and group."""
    home = tmp_path_factory.mktemp("conditional")
    shutil.copytree(trained / "tiny" / "vae", home / "tiny" / "vae")
    where = ["--data", phantoms, "--checkpoints", home, "--cache", home / "cache", "--run", "tiny"]
    run("train.py", *where, *TINY_UNET, *ALL, "--grid", "full", "--epochs", "2", "--sample-every", "2")
    return home


def test_weights_say_what_they_know_and_nothing_of_a_person(conditional: Path, phantoms: Path):
    meta = read_meta(conditional / "tiny" / "diffusion" / "best.safetensors")
    attributes = from_header(meta, [0, 0, 2, 2])
    assert meta["attributes"][3]["name"] == "group"
    assert [a.name for a in attributes] == ["level", "age", "sex", "group"]
    known = known_by_phantoms(phantoms)
    ages = [float(known[p.name]["age"]) for p in (phantoms / "train").rglob("*.png")]
    low, high = attributes[1].quantiles[0], attributes[1].quantiles[-1]
    assert min(ages) - 1 < low <= min(ages) and max(ages) <= high < max(ages) + 1 and low == int(low)
    assert attributes[3].values == ("AD", "NC") and sum(attributes[2].shares) == pytest.approx(1)
    assert not {*known} & {*json.dumps(meta["attributes"]).split('"')}


def test_drawing_what_is_asked_for(conditional: Path, tmp_path: Path):
    where = ["--checkpoints", conditional, "--run", "tiny", "--num-images", "6"]
    run("predict.py", *where, "--out", tmp_path / "a")
    run("predict.py", *where, "--out", tmp_path / "b", "--set", "sex=F", "level=0.5", "group=NC")
    free, asked = (list(csv.DictReader((tmp_path / n / "manifest.csv").read_text().splitlines())) for n in "ab")
    assert {r["sex"] for r in asked} == {"F"} and {float(r["level"]) for r in asked} == {0.5}
    assert {r["class"] for r in asked} == {"NC"} and [r["class"] for r in free] == ["AD", "NC"] * 3
    assert [r["age"] for r in free] == [r["age"] for r in asked] and len({r["age"] for r in free}) == 6
    a, b = (images(tmp_path / n) for n in "ab")
    assert any((a[x] != b[y]).any() for x, y in zip(sorted(a), sorted(b)))
    # What was asked for travels with the images: the folder can be trained on with the same conditions.
    known = known_by_phantoms(tmp_path / "b")
    assert known[Path(asked[0]["file"]).name] == {
        "file": "s0i00000_0.png",
        **{k: asked[0][k] for k in ("level", "age", "sex")},
    }
    assert "set: sex=F level=0.5 group=NC" in (tmp_path / "b" / "README.md").read_text()
    # Shards write what one command writes.
    for shard in "10":
        flags = ["--shards", "2", "--shard", shard, "--batch-size", "2", "--out", tmp_path / "c"]
        run("predict.py", *where, *flags)
    shards = (tmp_path / "c" / "manifest.csv").read_text()
    assert shards == (tmp_path / "a" / "manifest.csv").read_text()
    again = run_any("predict.py", *where, "--out", tmp_path / "b", "--set", "sex=M")
    assert again.returncode == 2 and "another command" in again.stderr


def test_a_sweep_is_one_image_through_the_values(conditional: Path, tmp_path: Path):
    where = ["--checkpoints", conditional, "--run", "tiny"]
    out = tmp_path / "age"
    run("predict.py", *where, "--sweep", "age=60:80:10", "--set", "sex=M", "group=AD", "--out", out)
    rows = list(csv.DictReader((out / "manifest.csv").read_text().splitlines()))
    assert [r["age"] for r in rows] == ["60", "70", "80"]
    assert {(r["sex"], r["class"], r["level"]) for r in rows} == {("M", "AD", rows[0]["level"])}
    frames = [cv2.imread(str(out / r["file"]), cv2.IMREAD_GRAYSCALE) for r in rows]
    assert len({f.shape for f in frames}) == 1 and (frames[0] != frames[2]).any()
    # The middle one is what predict.py makes of the same seed and values.
    level = f"level={rows[0]['level']}"
    run(
        "predict.py",
        *where,
        "--num-images",
        "1",
        "--set",
        "age=70",
        "sex=M",
        "group=AD",
        level,
        "--out",
        tmp_path / "one",
    )
    (single,) = images(tmp_path / "one").values()
    assert np.abs(single.astype(int) - frames[1]).max() <= 2
    for name in ("strip.png", "sweep.gif", "README.md"):
        assert (out / name).stat().st_size > 500
    assert (
        "is complete"
        in run("predict.py", *where, "--sweep", "age=60:80:10", "--set", "sex=M", "group=AD", "--out", out).stdout
    )
    run("predict.py", *where, "--sweep", "sex", "--out", tmp_path / "sex")
    assert (tmp_path / "sex" / "sex_0001.png").exists()


WRONG = [
    (["--set", "age=120"], "age=120 is not among what the run was trained on: age"),
    (["--set", "size=3"], "has no attribute 'size': it has level"),
    (["--set", "age"], "sets nothing"),
    (["--set", "group=AD", "--class-name", "NC"], "leave out one"),
    (["--sweep", "age=60"], "is no sweep"),
    (["--sweep", "age=60:400:20"], "is not among"),
    (["--sweep", "sex", "--shards", "2"], "leave out"),
    (["--sweep", "sex", "--set", "sex=F"], "leave it out of --set"),
]


@pytest.mark.parametrize(("flags", "words"), WRONG)
def test_wrong_wishes_are_one_sentence(conditional: Path, tmp_path: Path, flags: list[str], words: str):
    done = run_any("predict.py", "--checkpoints", conditional, "--run", "tiny", *flags, "--out", tmp_path / "out")
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--condition", "weight"], "nothing says the weight of the slices in"),
        (["--condition", "split"], "nothing says the split"),
    ],
)
def test_conditions_that_the_data_does_not_have(conditional: Path, phantoms: Path, flags: list[str], words: str):
    where = ["--data", phantoms, "--checkpoints", conditional, "--cache", conditional / "cache", "--run", "tiny"]
    done = run_any("train.py", *where, *TINY_UNET, *flags, "--epochs", "1", "--dry-run")
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_run_goes_on_with_its_conditions_and_no_others(conditional: Path, phantoms: Path, tmp_path: Path):
    copied = Path(shutil.copytree(conditional, tmp_path / "c"))
    data = Path(shutil.copytree(phantoms, tmp_path / "data"))
    where = ["--data", data, "--checkpoints", copied, "--cache", copied / "cache", "--run", "tiny"]
    same = [*where, *TINY_UNET, "--grid", "full", "--epochs", "3"]
    refused = run_any("train.py", *same)
    assert refused.returncode == 2 and "condition" in refused.stderr
    table = (data / "attributes.csv").read_text()
    (data / "attributes.csv").write_text(table.replace(",M", ",X").replace(",F", ",M").replace(",X", ",F"))
    refused = run_any("train.py", *same, *ALL)
    assert refused.returncode == 2 and "attributes" in refused.stderr
    (data / "attributes.csv").write_text(table)
    assert "resuming" in run("train.py", *same, *ALL).stdout


def test_weights_of_before_there_were_conditions(conditional: Path, phantoms: Path, tmp_path: Path):
    """A file as older versions wrote it, made from one of today: the class is the one condition, with older names."""
    copied = Path(shutil.copytree(conditional, tmp_path / "c"))
    shutil.rmtree(copied / "tiny" / "diffusion")
    file = copied / "tiny" / "diffusion" / "best.safetensors"
    where = ["--checkpoints", copied, "--run", "tiny"]
    run("train.py", "--data", phantoms, "--cache", copied / "cache", *where, *TINY_UNET, "--epochs", "1")
    run("predict.py", *where, "--num-images", "4", "--guidance", "2", "--out", tmp_path / "new")
    with safe_open(file, framework="pt") as f:
        meta = json.loads(f.metadata()["meta"])
    del meta["attributes"]
    assert meta["model"].pop("conditions") == [2]
    meta["model"]["num_classes"] = 2
    tensors = {k.replace("unet.conditions.0.", "unet.label."): v for k, v in load_file(file).items()}
    assert "unet.label.weight" in tensors
    text = json.dumps(meta)
    save_file(tensors, file, metadata={"meta": text, "digest": weights_digest(text, tensors)})
    run("predict.py", *where, "--num-images", "4", "--guidance", "2", "--out", tmp_path / "old")
    new, old = images(tmp_path / "new"), images(tmp_path / "old")
    assert [*new] == [*old] and all(np.array_equal(new[name], old[name]) for name in new)
    state = torch.load(copied / "tiny" / "diffusion" / "last.pt", weights_only=True)
    for part, prefix in (("model", "unet."), ("ema", "module.unet.")):
        state[part][f"{prefix}label.weight"] = state[part].pop(f"{prefix}conditions.0.weight")
    del state["config"]["condition"]
    torch.save(state, copied / "tiny" / "diffusion" / "last.pt")
    more = run("train.py", "--data", phantoms, "--cache", copied / "cache", *where, *TINY_UNET, "--epochs", "2")
    assert "resuming" in more.stdout


def test_evaluating_asks_for_what_training_slices_have(conditional: Path, phantoms: Path, tmp_path: Path):
    where = ["--data", phantoms, "--checkpoints", conditional, "--cache", conditional / "cache", "--resamples", "20"]
    run_any("evaluate.py", *where, "--run", "tiny", "--num-images", "40", "--out", tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {"level_error", "age_slope", "sex_accuracy", "group_accuracy"} <= {*report["attributes"]}
    # A folder says what was asked for, too.
    run("predict.py", "--checkpoints", conditional, "--run", "tiny", "--num-images", "40", "--out", tmp_path / "out")
    run_any("evaluate.py", *where, "--images", tmp_path / "out", "--out", tmp_path / "folder")
    report = json.loads((tmp_path / "folder" / "report.json").read_text())
    assert {"level_error", "age_error", "sex_accuracy", "group_accuracy"} <= {*report["attributes"]}


@pytest.mark.parametrize("colour", ["age", "sex"])
def test_tsne_is_coloured_by_any_attribute(conditional: Path, phantoms: Path, tmp_path: Path, colour: str):
    where = ["--data", phantoms, "--checkpoints", conditional, "--cache", conditional / "cache", "--run", "tiny"]
    done = run("tsne.py", *where, "--perplexity", "5", "--colour", colour, "--out", tmp_path / "map")
    result = json.loads((tmp_path / "map" / "tsne.json").read_text())
    assert ("separation" in result) == (colour == "sex") == ("F / M" in done.stdout)
    picture = cv2.imread(str(tmp_path / "map" / "tsne.png")).reshape(-1, 3)
    assert len(np.unique(picture, axis=0)) > (500 if colour == "age" else 50)


# ---------------------------------------------------------------------------------------------------------------------
# Editing


def test_inverting_finds_the_noise_that_an_image_came_from():
    model, y = tiny_diffusion(grid="full"), torch.tensor([[0, 0.5], [1, -1.0], [math.nan, 0]])
    noise = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    grid = make_grid("logsnr", 25, ABAR).tolist()
    how = {"timesteps": grid, "solver": "ddim"}
    z = sample(model.denoiser(y), noise, model.scheduler, **how)
    found, calls = invert(model.denoiser(y), z, model.scheduler, grid, tolerance=1e-5, most=100)
    assert calls > 25 and (found - noise).abs().max() < 1e-2 * noise.abs().max()
    again = sample(model.denoiser(y), found, model.scheduler, **how)
    assert (again - z).abs().max() < 1e-3 * z.abs().max()


def test_editing_slices(conditional: Path, phantoms: Path, tmp_path: Path):
    where = ["--checkpoints", conditional, "--run", "tiny", "--num-steps", "12"]
    folder = phantoms / "val" / "NC"
    done = run("edit.py", *where, "--images", folder, "--set", "age=85", "group=AD", "--out", tmp_path / "old")
    assert "No prognosis" in done.stdout
    rows = list(csv.DictReader((tmp_path / "old" / "edits.csv").read_text().splitlines()))
    known = known_by_phantoms(phantoms)
    assert [r["file"] for r in rows] == sorted(p.name for p in folder.glob("*.png"))
    for r in rows:  # the table beside train/ says what is known, and the folder the group
        assert float(r["age_before"]) == pytest.approx(float(known[r["file"]]["age"]), abs=0.06)
        assert (r["sex_before"], r["sex_after"]) == (known[r["file"]]["sex"],) * 2
        assert (r["age_after"], r["group_before"], r["group_after"]) == ("85", "NC", "AD")
        assert abs(float(r["psnr_roundtrip"]) - float(r["psnr_vae"])) < 1 and float(r["unlikeness"]) <= 1
        stem = r["file"].removesuffix(".png")
        shown = {k: cv2.imread(str(tmp_path / "old" / f"{stem}_{k}.png"), cv2.IMREAD_UNCHANGED) for k in KINDS}
        assert shown["before"].shape == shown["after"].shape and shown["change"].shape[2] == 3
        change = shown["after"].astype(int) - shown["roundtrip"]
        assert np.abs(change).max() == float(r["largest_change"])
    text = (tmp_path / "old" / "README.md").read_text()
    assert "No prognosis" in text and "as private as the slices" in text and "12 steps" in text
    assert (tmp_path / "old" / "comparison.png").stat().st_size > 1000
    # One file; guidance 0 is no change at all.
    file = sorted(folder.glob("*.png"))[0]
    run("edit.py", *where, "--images", file, "--set", "age=85", "--guidance", "0", "--out", tmp_path / "same")
    (row,) = csv.DictReader((tmp_path / "same" / "edits.csv").read_text().splitlines())
    assert float(row["largest_change"]) <= 1
    # Without a table nothing is known but what is said.
    alone = Path(shutil.copy(file, tmp_path / "alone_1.png"))
    run(
        "edit.py", *where, "--images", alone, "--set", "age=85", "--known", "sex=F", "age=60", "--out", tmp_path / "one"
    )
    (row,) = csv.DictReader((tmp_path / "one" / "edits.csv").read_text().splitlines())
    assert (row["age_before"], row["sex_before"], row["group_before"]) == ("60", "F", "")


KINDS = ("before", "roundtrip", "after", "change")


def test_edits_that_cannot_be_meant(conditional: Path, phantoms: Path, tmp_path: Path):
    where = ["--checkpoints", conditional, "--run", "tiny", "--num-steps", "4", "--out", tmp_path / "out"]
    slices = ["--images", phantoms / "val" / "NC"]
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    (tmp_path / "odd").mkdir()
    cv2.imwrite(str(tmp_path / "odd" / "noise_1.png"), noise)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    for words, sentence in (
        (slices, "--set says what to change"),
        ([*slices, "--set", "age=200"], "age=200 is not among"),
        ([*slices, "--set", "age=80", "--known", "height=2"], "has no attribute 'height'"),
        (["--set", "age=80"], "name one that holds images"),
        (["--images", tmp_path / "nowhere", "--set", "age=80"], "there is no file or folder"),
        (["--images", tmp_path / "odd", "--set", "age=80"], "is unlike all that the run was trained on"),
        ([*slices, "--set", "age=80", "--num-steps", "1"], "2 to 1000"),
        ([*slices, "--set", "age=80", "--out", tmp_path / "full"], "is not an empty folder"),
    ):
        done = run_any("edit.py", *where, *words)
        assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr, (words, done.stderr)
    odd = ["--images", tmp_path / "odd", "--set", "age=80"]
    run("edit.py", *where, *odd, "--unlike")
    assert (tmp_path / "out" / "noise_1_after.png").exists()


def test_a_student_knows_what_its_teacher_knows(conditional: Path, tmp_path: Path):
    copied = Path(shutil.copytree(conditional, tmp_path / "c"))
    where = ["--checkpoints", copied, "--run", "s"]
    flags = "--teacher tiny --trajectories 32 --batch-size 16 --epochs 1 --num-steps 2 --teacher-steps 8".split()
    run("distil.py", *where, *flags, "--cache", copied / "cache", "--wandb", "disabled", "--precision", "fp32")
    teacher, student = (read_meta(copied / r / "diffusion" / "best.safetensors") for r in ("tiny", "s"))
    assert student["attributes"] == teacher["attributes"] and student["typical"] == teacher["typical"]
    run(
        "predict.py",
        *where,
        "--num-images",
        "2",
        "--set",
        "age=70",
        "sex=F",
        "--guidance",
        "1.5",
        "--out",
        tmp_path / "o",
    )
    rows = list(csv.DictReader((tmp_path / "o" / "manifest.csv").read_text().splitlines()))
    assert [(r["age"], r["sex"]) for r in rows] == [("70", "F")] * 2
    refused = run_any("edit.py", *where, "--images", "x", "--set", "age=70", "--out", tmp_path / "e")
    assert refused.returncode == 2 and "take its teacher's run" in refused.stderr
