"""The phantoms are what they claim to be: seeded, separable but overlapping, measurable, and safely written."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import PATIENCE
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import anatomy  # noqa: E402
import phantom  # noqa: E402

PEOPLE, SLICES = 60, 5


def run(*args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "phantom.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture(scope="module", params=[256, 64])
def crowd(request):
    """(size, classes [n], images [n, size, size], anatomy rows [n]) of sixty people."""
    names, images, rows = [], [], []
    for i in range(PEOPLE):
        name, x, r = phantom.draw_person(11, i, SLICES, request.param)
        names += [name] * SLICES
        images.append(x)
        rows += r
    return request.param, np.array(names), np.concatenate(images), rows


def column(rows: list[dict], key: str) -> np.ndarray:
    return np.array([r[key] for r in rows])


def test_same_seed_same_person_other_seed_other_person():
    name, a, rows = phantom.draw_person(5, 3, 3, 64)
    again, b, same_rows = phantom.draw_person(5, 3, 3, 64)
    assert name == again == "NC" and rows == same_rows
    np.testing.assert_array_equal(a, b)
    assert (phantom.draw_person(6, 3, 3, 64)[1] != a).any()
    assert (phantom.draw_person(5, 1, 3, 64)[1] != a).any()


def test_slices_belong_to_their_person():
    people = [phantom.draw_person(2, i, 8, 128)[1].astype(float) for i in range(6)]
    within = [np.abs(p[s] - p[s + 1]).mean() for p in people for s in range(7)]
    between = [np.abs(p[s] - q[s]).mean() for p in people for q in people if p is not q for s in range(8)]
    assert np.mean(within) < 0.7 * np.mean(between)
    assert np.max(within) < np.mean(between)  # no jump between neighbours


def test_classes_differ_and_overlap(crowd):
    _, names, _, rows = crowd
    ad = names == "AD"
    v = column(rows, "ventricle_fraction")
    assert 0.8 < anatomy.cohens_d(v[ad], v[~ad]) < 2.5
    assert v[~ad].max() > v[ad].mean() and v[ad].min() < v[~ad].mean()
    s, c = column(rows, "sulci_fraction"), column(rows, "cortex_fraction")
    assert 0.5 < anatomy.cohens_d(s[ad], s[~ad]) < 2
    assert -2 < anatomy.cohens_d(c[ad], c[~ad]) < -0.5


def test_age_and_sex_show(crowd):
    _, names, _, rows = crowd
    age, male = column(rows, "age"), column(rows, "sex") == "M"
    assert phantom.AGES[0] <= age.min() and age.max() <= phantom.AGES[1] and 0.2 < male.mean() < 0.8
    assert np.corrcoef(age, column(rows, "ventricle_fraction"))[0, 1] > 0.3  # found: 0.5
    assert anatomy.cohens_d(column(rows, "brain_area")[male], column(rows, "brain_area")[~male]) > 1  # found: 1.9


@pytest.mark.parametrize("size", [256, 64])
def test_the_same_person_with_other_values(size):
    for index in range(8):
        name, image, (row,) = phantom.draw_person(4, index, 1, size)
        own = {"group": name, "age": row["age"], "sex": row["sex"]}
        np.testing.assert_array_equal(phantom.draw_person(4, index, 1, size, **own)[1], image)
        areas = []
        for age in (60, 75, 90):
            group, aged, (r,) = phantom.draw_person(4, index, 1, size, age=age)
            assert (group, r["age"], r["sex"], r["level"]) == (name, age, row["sex"], row["level"])
            areas.append(r["ventricle_area"])
            # Outside of the ventricles and sulci, next to nothing changes: the same head, folds and noise.
            assert np.median(np.abs(aged.astype(int) - image)) <= 3
        assert areas[0] < areas[1] < areas[2]
        ill, well = (phantom.draw_person(4, index, 1, size, group=g)[2][0] for g in ("AD", "NC"))
        assert ill["ventricle_fraction"] > well["ventricle_fraction"] and ill["age"] == well["age"] == row["age"]
        men, women = (phantom.draw_person(4, index, 1, size, sex=s)[2][0] for s in ("M", "F"))
        assert men["brain_area"] > 1.04 * women["brain_area"]


def test_slices_at_levels_that_are_asked_for():
    levels = [0.9, 0.25, 0.5]
    _, images, rows = phantom.draw_person(4, 2, size=64, levels=levels)
    assert [r["level"] for r in rows] == levels and len(images) == 3


def test_measured_follows_true(crowd):
    size, names, images, rows = crowd
    true, measured = column(rows, "ventricle_fraction"), anatomy.ventricle_fraction(images)
    assert measured.shape == (len(images),) and measured.dtype == np.float64
    assert np.corrcoef(true, measured)[0, 1] > (0.95 if size == 256 else 0.92)
    assert abs(measured.mean() / true.mean() - 1) < 0.2
    blurred = np.stack([cv2.GaussianBlur(x, (0, 0), 1.2 * size / 256) for x in images[::3]])
    assert np.corrcoef(true[::3], anatomy.ventricle_fraction(blurred))[0, 1] > 0.85
    assert anatomy.cohens_d(measured[names == "AD"], measured[names == "NC"]) > 0.8


def test_pictures_are_sane(crowd):
    size, _, images, rows = crowd
    edge = size // 20
    assert images.dtype == np.uint8
    for side in (images[:, :edge], images[:, -edge:], images[:, :, :edge], images[:, :, -edge:]):
        assert not side.any()
    brain = column(rows, "brain_area")
    assert (0.2 < brain / size**2).all() and (brain / size**2 < 0.5).all()
    # The true area is that of the picture: every pixel inside is lit, none outside.
    np.testing.assert_allclose((images > 0).sum((1, 2)), brain, rtol=0.03)
    v, c, s = (column(rows, f"{k}_fraction") for k in ("ventricle", "cortex", "sulci"))
    assert (v > 0.005).all() and (v < 0.25).all() and (v + c + s < 0.9).all()
    lit = images[images > 0]
    assert 185 < np.percentile(lit, 80) < 225 and 25 < np.percentile(lit, 2) < 60


@settings(max_examples=25, deadline=None)
@given(size=st.integers(32, 512), index=st.integers(0, 10**6), slices=st.integers(1, 2))
def test_any_size_shows_the_same_anatomy(size, index, slices):
    name, images, rows = phantom.draw_person(1, index, slices, size)
    _, _, reference = phantom.draw_person(1, index, slices, 256)
    assert name == phantom.CLASSES[index % 2] and images.shape == (slices, size, size)
    for row, ref in zip(rows, reference):
        assert row["ventricle_fraction"] == pytest.approx(ref["ventricle_fraction"], rel=0.12, abs=0.002)
        assert row["brain_area"] / size**2 == pytest.approx(ref["brain_area"] / 256**2, rel=0.03)
    fraction = anatomy.ventricle_fraction(images)
    assert ((fraction >= 0) & (fraction < 0.3)).all()


def test_small_images_have_folds_that_their_pixels_can_hold():
    person = phantom._Person(7, 4)
    sulci = [person.sulci(0.5, coarse)[1].shape[1] for coarse in (1, 2)]
    assert sulci == [2 * person.OUTER, person.OUTER]  # half as many open on the outline
    # A blur of one pixel leaves more of them than of a large drawing shrunk to the same size.
    left = []
    for size in (64, 256):
        for image in np.concatenate([phantom.draw_person(7, i, 2, size)[1] for i in range(6)]):
            image = cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA)
            depth = cv2.distanceTransform((image > 0).astype(np.uint8), cv2.DIST_L2, 5)
            left.append(cv2.GaussianBlur(image, (0, 0), 1)[(depth > 2) & (depth < 7)].std())
    assert np.mean(left[:12]) > 1.2 * np.mean(left[12:])  # found: 36.9 and 26.1 grey levels


@pytest.mark.parametrize("fill", [0, 1, 90, 255])
def test_measuring_what_is_no_brain(fill):
    assert anatomy.ventricle_fraction(np.full((2, 64, 64), fill, np.uint8)).tolist() == [0, 0]
    assert anatomy.ventricle_fraction(np.zeros((0, 64, 64), np.uint8)).shape == (0,)


def test_cohens_d():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 2, 40000), rng.normal(0, 2, 20000)
    assert anatomy.cohens_d(a, b) == pytest.approx(0.5, abs=0.03)
    assert anatomy.cohens_d([1, 2, 3], [2, 3, 4]) == -anatomy.cohens_d([2, 3, 4], [1, 2, 3]) == -1


def test_make_dataset(tmp_path):
    out = tmp_path / "new" / "set"
    assert phantom.make_dataset(out, people=10, slices=2, size=64, seed=4, val_fraction=0.2, progress=False) == out
    assert [p.name for p in out.parent.iterdir()] == ["set"]  # nothing temporary left
    rows = list(csv.DictReader((out / "anatomy.csv").read_text().splitlines()))
    files = {p.relative_to(out).as_posix() for p in out.rglob("*.png")}
    assert {r["file"] for r in rows} == files and len(rows) == len(files) == 20
    for known, r in zip(csv.DictReader((out / "attributes.csv").read_text().splitlines()), rows):
        assert known == {"file": Path(r["file"]).name, **{k: r[k] for k in ("level", "age", "sex")}}
    assert "SYNTHETIC" in (out / "README.txt").read_text()
    split = {}
    for r in rows:
        name, images, truth = phantom.draw_person(4, int(r["subject"][1:]), 2, 64)
        i = int(r["slice"])
        assert r["file"] == f"{r['split']}/{name}/{r['subject']}_{i:02d}.png" and r["class"] == name
        np.testing.assert_array_equal(cv2.imread(str(out / r["file"]), cv2.IMREAD_UNCHANGED), images[i])
        for key in ("age", "brain_area", "ventricle_area", "ventricle_fraction", "cortex_fraction", "sulci_fraction"):
            assert float(r[key]) == pytest.approx(truth[i][key], rel=1e-4)
        assert r["sex"] == truth[i]["sex"]
        assert split.setdefault(r["subject"], r["split"]) == r["split"]
    assert {(r["split"], r["class"]) for r in rows} == {(s, c) for s in ("train", "val") for c in phantom.CLASSES}
    # The same person in a smaller data set; an empty folder may be drawn into.
    (tmp_path / "small").mkdir()
    small = phantom.make_dataset(tmp_path / "small", people=4, slices=2, size=64, seed=4, progress=False)
    for path in small.rglob("*.png"):
        assert next(out.rglob(path.name)).read_bytes() == path.read_bytes()


def test_refusals_write_nothing(tmp_path):
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    file.write_text("keep")
    bad = [
        (full, {}),
        (file, {}),
        (file / "below", {}),
        (tmp_path / "a", {"people": 3}),
        (tmp_path / "a", {"size": 31}),
    ]
    bad += [(tmp_path / "a", {k: v}) for k, v in (("slices", 0), ("slices", 101), ("seed", -1), ("val_fraction", 1.0))]
    for out, kwargs in bad:
        with pytest.raises(phantom.Unusable):
            phantom.make_dataset(out, **{"people": 4, "slices": 1, "size": 32, "progress": False} | kwargs)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "full", "mine.txt"]


def test_failure_half_way_leaves_nothing(tmp_path):
    # A real full disk is not at hand; a limit on the size of files makes the same kind of error at the last file.
    pytest.importorskip("resource")
    code = f"import resource, signal, sys; sys.path.insert(0, {str(ROOT)!r}); import phantom\n"
    code += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))\n"
    code += f"sys.argv = ['phantom.py', {str(tmp_path / 'set')!r}, '--people', '4', '--size', '128']; phantom.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: cannot write")
    assert not list(tmp_path.iterdir())


def test_command_line_draws_and_measures(tmp_path):
    out = tmp_path / "set"
    done = run(out, "--people", 8, "--slices", 3, "--size", 64)
    assert done.returncode == 0, done.stderr
    assert len(list(out.rglob("*.png"))) == 24
    before = sorted(out.rglob("*"))
    done = run(out, "--measure")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and [x.split()[:2] for x in lines[1:3]] == [["AD", "12"], ["NC", "12"]]
    assert lines[3].startswith("Cohen's d (AD - NC): ") and sorted(out.rglob("*")) == before
    # A manifest says which files count, and of which class; one class alone has no d.
    nc = sorted(out.rglob("NC/*.png"))[:5]
    (out / "manifest.csv").write_text("file,class\n" + "".join(f"{p.relative_to(out)},made\n" for p in nc))
    lines = run(out, "--measure").stdout.splitlines()
    assert len(lines) == 2 and lines[1].split()[:2] == ["made", "5"]


def test_the_same_people_with_other_values(tmp_path):
    own, ill = tmp_path / "own", tmp_path / "ill"
    for out, values in ((own, {}), (ill, phantom.read_given(["group=AD", "age=85"]))):
        phantom.make_dataset(out, people=6, slices=2, size=64, progress=False, given=values)
    tables = [list(csv.DictReader((f / "anatomy.csv").read_text().splitlines())) for f in (own, ill)]
    for a, b in zip(*tables, strict=True):
        assert all(a[k] == b[k] for k in ("split", "subject", "level", "sex"))
        assert b["class"] == "AD" and b["age"] == "85" and (ill / b["file"]).exists()
        assert float(b["ventricle_area"]) > float(a["ventricle_area"]) or (a["class"] == "AD" and float(a["age"]) >= 85)
    assert "--given group=AD age=85" in (ill / "README.txt").read_text()


def test_command_line_errors_are_one_sentence(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    cases = [
        ("full",),
        ("a", "--people", 2),
        ("a", "--size", 8),
        ("full", "--measure"),
        ("empty", "--measure"),
        ("none", "--measure"),
        ("a", "--given", "age=120"),
        ("a", "--given", "age=old"),
        ("a", "--given", "weight=70"),
    ]
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        cases.append(("locked/set",))
    for folder, *rest in cases:
        done = run(tmp_path / folder, *rest)
        assert done.returncode == 2, (folder, rest)
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "a").exists()
