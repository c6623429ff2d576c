"""The evidence as a whole: what is as good as real people passes, and damage is caught where it should be."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import run_any
from torchvision.transforms.functional import gaussian_blur

import evidence
import metrics
import phantom
from conditions import encode_rows, learn_attribute
from config import EvaluateConfig
from dataset import read_images
from evidence import Evidence, Images
from utils import UserError

SIDE, CLASSES = 64, ["AD", "NC"]


ATTRIBUTES = [learn_attribute("level", ["0", "0.5", "1"]), learn_attribute("age", ["55", "72", "90"])]
ATTRIBUTES += [learn_attribute("sex", ["F", "M"]), learn_attribute("group", CLASSES)]


def people(seed: int, first: int, count: int, slices: int = 4, **given) -> Images:
    """Phantoms of `count` people: four slices each, or a random one of the four."""
    drawn = [phantom.draw_person(seed, i, 4, SIDE, **given) for i in range(first, first + count)]
    kept = [np.arange(4) if slices == 4 else np.random.default_rng(first + i).integers(4, size=1) for i in range(count)]
    pixels = torch.from_numpy(np.concatenate([images[k] for k, (_, images, _) in zip(kept, drawn)]))
    labels = torch.tensor([CLASSES.index(name) for name, _, _ in drawn]).repeat_interleave(slices)
    known = [{**rows[i], "group": name} for k, (name, _, rows) in zip(kept, drawn) for i in k]
    y = encode_rows(ATTRIBUTES, {a.name: [str(r[a.name]) for r in known] for a in ATTRIBUTES}, len(known))
    return Images(pixels, labels, np.repeat([f"P{i}" for i in range(first, first + count)], slices), y)


@pytest.fixture(scope="module")
def sets() -> tuple[Images, Images, Images]:
    """(train, held out, as good as generated can be): 40, 30 and 120 people of one population; 160, 120, 120 slices."""
    return people(0, 0, 40), people(0, 100, 30), people(0, 200, 120, slices=1)


@pytest.fixture
def look(sets, tmp_path: Path):
    """look(section, generated) -> what the section puts into the report."""

    def look(section, generated: Images, held_out: Images | None = None, **how) -> dict:
        cfg = replace(EvaluateConfig(), resamples=40, training_pictures=False)
        e = Evidence(sets[0], held_out or sets[1], generated, CLASSES, cfg, torch.device("cpu"), tmp_path, **how)
        section(e)
        return e.report

    return look


def test_images_that_show_what_was_asked_reach_the_floor_and_others_do_not(look, sets):
    """Generated images of other people, and the same with values that belong to somebody else."""
    made = sets[2]
    right = look(evidence.attributes, made, attributes=ATTRIBUTES)["attributes"]
    y = made.conditions[torch.randperm(len(made), generator=torch.Generator().manual_seed(0))]
    wrong = look(evidence.attributes, replace(made, conditions=y), attributes=ATTRIBUTES)["attributes"]
    assert right["level_error"]["value"] < 1.5 * right["level_error"]["floor"] < 0.3  # found: 0.09 and 0.09
    assert right["level_slope"]["value"] > 0.6 and abs(wrong["level_slope"]["value"]) < 0.4
    assert wrong["level_error"]["value"] > 2 * right["level_error"]["value"]
    assert right["sex_accuracy"]["value"] > 0.7 > wrong["sex_accuracy"]["value"]
    assert {*right} == {f"{n}_{m}" for n in ("level", "age") for m in ("error", "slope")} | {
        "sex_accuracy", "group_accuracy",
    }  # fmt: skip
    assert 0 < right["age_error"]["value"] < 15 and right["age_error"]["floor"] < 15  # in years


def test_effects_are_those_of_the_phantoms(look, sets):
    made = sets[2]
    found = look(evidence.anatomical, made, attributes=ATTRIBUTES)["effects"]
    age, group = found["age_on_ventricle_fraction"], found["group_NC_against_AD_on_ventricle_fraction"]
    for effect, low in ((age, 0.7), (found["sex_M_against_F_on_brain_area"], 0.7)):
        assert effect["value"] > low and effect["floor"] > low and effect["ci_low"] < effect["value"]
    assert group["value"] < -0.5 and group["floor"] < -0.5
    # What does not follow the age has no effect of it.
    y = made.conditions.clone()
    y[:, 1] = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0)), 1]
    off = look(evidence.anatomical, replace(made, conditions=y), attributes=ATTRIBUTES)["effects"]
    assert abs(off["age_on_ventricle_fraction"]["value"]) < 0.6 * age["value"]


def test_unknown_values_cost_their_rows_only(look, sets):
    made = sets[2]
    y = made.conditions.clone()
    y[::3, 1], y[:, 2] = float("nan"), float("nan")
    found = look(evidence.attributes, replace(made, conditions=y), attributes=ATTRIBUTES)["attributes"]
    assert "age_error" in found and "sex_accuracy" not in found and "group_accuracy" in found
    assert "effects" not in look(evidence.anatomical, replace(made, conditions=y), attributes=ATTRIBUTES)


def as_images(x: torch.Tensor, like: Images) -> Images:
    """float [N, 1, S, S] in [0, 1] -> the set with these pixels."""
    return replace(like, pixels=(x.clamp(0, 1) * 255).round().to(torch.uint8)[:, 0])


def blurred(s: Images) -> Images:
    return as_images(gaussian_blur(s.images(), [7, 7], [1.0, 1.0]), s)


def noised(s: Images, sd: float = 0.1) -> Images:
    g = torch.Generator().manual_seed(0)
    return as_images(s.images() + sd * torch.randn(s.images().shape, generator=g), s)


def collapsed(s: Images) -> Images:
    return replace(s, pixels=s.pixels[:1].expand_as(s.pixels).contiguous())


def test_spectrum_sees_blur_and_noise(look, sets):
    real, soft, grainy = (look(evidence.spectrum, f(sets[2]))["spectrum"] for f in (lambda s: s, blurred, noised))
    assert abs(real["high_frequencies_db"]["value"]) < 1.5 and real["distance_db"]["value"] < 1.5
    assert soft["high_frequencies_db"]["value"] < -6 and grainy["high_frequencies_db"]["value"] > 2.5
    for damaged in (soft, grainy):
        assert damaged["distance_db"]["ci_low"] > 3 * damaged["distance_db"]["floor"]


def test_diversity_sees_one_image_repeated(look, sets):
    real, dull = (look(evidence.diversity, s)["diversity"]["ms_ssim"] for s in (sets[2], collapsed(sets[2])))
    assert real["value"] == pytest.approx(real["floor"], abs=0.05)
    assert dull["value"] > 0.999 > real["ci_high"]


def test_matched_noise_is_distributed_as_what_is_missing(sets):
    """The same spectrum and the same deviation where the image is dark and where it is bright; another sample."""
    real, soft = sets[0], blurred(sets[0])
    noisy = evidence.with_matched_noise(soft, real, seed=0)
    x = soft.images()[:, 0].numpy()
    missing, added = (s.images()[:, 0].numpy() - x for s in (real, noisy))
    for where in ((x > 0.1) & (x < 0.3), x >= 0.3):
        assert added[where].std() == pytest.approx(missing[where].std(), rel=0.15)
    a, b = (np.log(np.square(np.abs(np.fft.fft2(v))).mean(0).ravel()[1:]) for v in (missing, added))
    assert np.corrcoef(a, b)[0, 1] > 0.8
    assert abs(np.corrcoef(missing.ravel(), added.ravel())[0, 1]) < 0.05


@pytest.mark.full
def test_the_judge_is_at_chance_on_people_sure_of_damage_and_not_fooled_by_grain(look, sets):
    """Blurred images and reconstructions are told from real slices, and those with noise of the same spectrum and
    strength still are."""
    from vae import VAE

    torch.manual_seed(0)
    vae = VAE(SIDE, 8, 4, (16, 32), 1, False)
    optimizer, x = torch.optim.Adam(vae.parameters(), lr=3e-3), 2 * sets[0].images() - 1
    for _ in range(120):  # a VAE that blurs
        rows = torch.randint(len(x), (16,))
        (vae(x[rows], torch.randn(16, *vae.latent_shape))[0] - x[rows]).abs().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    alike = look(evidence.two_sample, sets[2])["two_sample"]["auc"]
    assert 0.25 < alike["value"] < 0.75 and 0.25 < alike["floor"] < 0.75
    found = look(evidence.two_sample, blurred(sets[2]), vae=vae.eval())["two_sample"]
    assert found["auc"]["value"] > 0.95 and found["accuracy"]["value"] > 0.85
    assert found["auc"]["ci_low"] > found["auc"]["floor"]
    assert found["auc_of_reconstructed"]["value"] > 0.95 and found["auc_of_reconstructed_noised"]["value"] > 0.9


def test_two_sample_test_needs_people_and_images(look, sets):
    with pytest.raises(metrics.TooFew, match="at least 4 people in each set, and one set has 2"):
        look(evidence.two_sample, sets[2], held_out=replace(sets[1], people=sets[1].people[:120:60].repeat(60)))
    with pytest.raises(metrics.TooFew, match="needs at least 40 images of each set, and there are 7"):
        look(evidence.two_sample, sets[2].take(np.arange(7)))


def test_anatomy_sees_shifted_ventricles_by_class(look, sets):
    real = look(evidence.anatomical, sets[2])
    for measure in ("brain_area_d", "ventricle_fraction_d", "contrast_d"):
        assert abs(real["anatomy"][measure]["value"]) < 0.5, measure
    d = real["class_difference"]["ventricle_fraction_d"]
    assert d["value"] > 0.6 and d["floor"] > 0.6 and d["ci_low"] > 0.3
    assert {"anatomy_AD", "anatomy_NC"} <= real.keys()
    # only AD people: overall the ventricles are too wide, within the class they are not
    ad = sets[2].take(torch.nonzero(sets[2].labels == 0)[:, 0])
    one = look(evidence.anatomical, ad)
    assert (
        one["anatomy"]["ventricle_fraction_d"]["value"] > 0.3 > abs(one["anatomy_AD"]["ventricle_fraction_d"]["value"])
    )
    assert "anatomy_NC" not in one and "class_difference" not in one
    pale = look(evidence.anatomical, as_images(sets[2].images() ** 0.4, sets[2]))
    assert pale["anatomy"]["contrast_d"]["value"] < -2 and pale["anatomy"]["contrast_emd"]["value"] > 2


def test_anatomy_by_class_survives_a_resample_without_anybody_of_a_class(look, sets):
    held_out = sets[1]
    by_class = [np.unique(held_out.people[held_out.labels.numpy() == c])[:3] for c in (0, 1)]
    few = held_out.take(np.flatnonzero(np.isin(held_out.people, np.concatenate(by_class))))
    weights = metrics.resample_people(few.people, 40, EvaluateConfig().seed + 1)
    assert any((weights[few.labels == c].sum(0) == 0).any() for c in (0, 1))  # so that this test says something
    found = look(evidence.anatomical, sets[2], held_out=few)
    for name in CLASSES:
        assert found[f"anatomy_{name}"]["brain_area_emd"]["floor"] > 0


@pytest.mark.full
def test_class_fidelity_sees_swapped_labels(look, sets):
    made = people(0, 200, 160, slices=1)
    swapped = look(evidence.class_fidelity, replace(made, labels=1 - made.labels))["class_fidelity"]
    assert swapped["train_on_real"]["value"] > 0.65
    assert swapped["train_on_generated"]["value"] < 0.4 and swapped["real_to_generated"]["value"] < 0.4
    assert swapped["train_on_generated"]["floor"] == swapped["train_on_real"]["value"]


def test_class_fidelity_names_the_class_that_is_missing(look, sets):
    ad = sets[2].take(torch.nonzero(sets[2].labels == 0)[:, 0])
    with pytest.raises(metrics.TooFew, match="at least 20 images of class NC, and 0 are generated"):
        look(evidence.class_fidelity, ad)


def test_memorisation_flags_training_slices_and_not_people(look, sets):
    train, held_out, _ = sets
    copy_rate = {
        name: look(evidence.memorisation, s)["memorisation"]["copy_rate"]
        for name, s in {
            "copies": train, "noise": noised(train, 0.05), "bright": as_images(0.85 * train.images(), train),
            "shift": replace(train, pixels=train.pixels.roll((3, -2), (1, 2))),
            "mirror": replace(train, pixels=train.pixels.flip(2)), "held out": held_out,
            "others": people(0, 500, 150, 1),
        }.items()
    }  # fmt: skip
    assert copy_rate["copies"]["value"] >= 0.99 and copy_rate["copies"]["ci_low"] > 0.95
    for name in ("noise", "bright", "shift", "mirror"):
        assert copy_rate[name]["value"] >= 0.95, name
    assert copy_rate["held out"]["value"] <= 0.04 and copy_rate["others"]["value"] <= 0.04
    assert copy_rate["others"]["ci_low"] < 0.01 < copy_rate["others"]["ci_high"] < 0.2


def test_membership_tells_who_was_learnt_by_heart_and_nobody_else(sets, tmp_path: Path):
    from modules import NoiseScheduler_Fast_DDPM, StableDiffusion, UNet
    from vae import VAE

    torch.manual_seed(0)
    vae = VAE(SIDE, 8, 2, (8, 16), 1, False).eval()
    model = StableDiffusion(UNet(2, SIDE // 8, (32, 64), 1, (), ()), NoiseScheduler_Fast_DDPM())
    some = [np.isin(s.people, sorted(set(s.people))[:6]) for s in sets[:2]]
    train, held_out = (s.take(np.flatnonzero(rows)) for s, rows in zip(sets, some))
    vae.measure_latents([2 * train.images() - 1])

    def found() -> dict[str, dict[str, float]]:
        cfg = replace(EvaluateConfig(), resamples=100)
        e = Evidence(train, held_out, sets[2], CLASSES, cfg, torch.device("cpu"), tmp_path, model.eval(), vae)
        evidence.membership(e)
        return e.report["membership"]

    # Images of a folder may have another size than the run's.
    small = Images(train.pixels[:, ::2, ::2], train.labels, train.people)
    e = Evidence(small, small, small, CLASSES, EvaluateConfig(), torch.device("cpu"), tmp_path, model.eval(), vae)
    evidence.membership(e)
    assert not e.report and "another size" in e.notes[0]

    before = found()
    assert len(before) == 11 and before["auc"]["n"] == 12 and before["auc"]["floor"] == 0.5
    with torch.no_grad():
        z = vae.encode(2 * train.images() - 1)[0]
    optimizer, t = torch.optim.Adam(model.parameters(), lr=3e-3), model.scheduler.timesteps
    for _ in range(500):
        steps = t[torch.randint(len(t), (len(z),))]
        model.train()(z, steps, torch.randn_like(z))[0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    # Between so few people chance gives 0.86 to a network that has learnt nothing; by heart it is 1.
    assert found()["auc"]["value"] > 0.95 > before["auc"]["value"]


def test_latent_spread_is_the_standard_deviation_per_channel(sets, tmp_path: Path):
    from vae import VAE

    vae = VAE(SIDE, 8, 2, (8, 16), 1, False).eval()
    g = torch.Generator().manual_seed(0)
    z = torch.randn(120, 2, 8, 8, generator=g) * torch.tensor([0.5, 2.0])[:, None, None] + 3
    e = Evidence(*sets, CLASSES, EvaluateConfig(), torch.device("cpu"), tmp_path, vae=vae, latents=z)
    evidence.latent_spread(e)
    for c, sd in enumerate((0.5, 2.0)):
        r = e.report["latent_spread"][f"channel_{c}"]
        assert r["value"] == pytest.approx(sd, rel=0.02) and r["ci_low"] < sd < r["ci_high"] and r["n"] == 120


# ---------------------------------------------------------------------------------------------------------------------
# The script


def write(folder: Path, s: Images) -> Path:
    for k, (image, y) in enumerate(zip(s.pixels.numpy(), s.labels.tolist())):
        (folder / CLASSES[y]).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / CLASSES[y] / f"{s.people[k]}_{k}.png"), image)
    return folder


@pytest.fixture(scope="module")
def data(sets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("evaluate")
    write(home / "data" / "train", sets[0])
    write(home / "data" / "val", sets[1])
    write(home / "generated", sets[2])
    return home


@pytest.fixture(scope="module")
def report(data: Path) -> Path:
    flags = ["--data", data / "data", "--cache", data / "cache", "--wandb", "disabled", "--resamples", "40"]
    # 120 images are fewer than the 128 that a Fréchet distance needs; everything else comes.
    done = run_any("evaluate.py", "--images", data / "generated", *flags, "--out", data / "report")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "random_vgg.frechet needs at least 128 images of each set, and there are 120" in done.stderr
    assert "memorisation" in done.stdout and "95 % interval" in done.stdout
    return data / "report"


@pytest.mark.full  # evaluate.py in short: test_report_of_a_run_that_is_too_small_for_some_metrics
def test_report_of_a_folder(report: Path):
    numbers = json.loads((report / "report.json").read_text())
    sections = set("random_vgg random_vgg_blurred autoencoder autoencoder_shuffled diversity unpaired spectrum".split())
    sections |= set("two_sample anatomy anatomy_AD class_difference class_fidelity memorisation".split())
    assert sections <= numbers.keys(), sections - numbers.keys()
    for section, rows in numbers.items():
        for metric, r in rows.items():
            assert r.keys() == {"value", "floor", "ci_low", "ci_high", "n"}, (section, metric)
            assert r["ci_low"] <= r["value"] <= r["ci_high"] and r["n"] > 0, (section, metric)
    for kind in ("random_vgg", "autoencoder"):
        real, floor = numbers[kind], numbers[kind]["precision"]["floor"]
        for metric in ("precision", "recall", "coverage"):
            assert real[metric]["value"] > 0.75 * real[metric]["floor"], (kind, metric)
        shuffled = numbers[f"{kind}_shuffled"]
        assert shuffled["precision"]["value"] < 0.1 * floor and shuffled["coverage"]["value"] < 0.1
        assert shuffled["kernel"]["ci_low"] > 10 * abs(real["kernel"]["value"])
    fidelity = numbers["class_fidelity"]
    for metric in ("train_on_real", "train_on_generated", "train_on_both", "real_to_generated"):
        assert fidelity[metric]["value"] > 0.65, metric
    # the random network sees blur, the trained one sees noise
    assert numbers["random_vgg_blurred"]["kernel"]["value"] > 5 * numbers["random_vgg"]["kernel"]["ci_high"]
    assert numbers["autoencoder_noised"]["kernel"]["value"] > 2 * numbers["autoencoder"]["kernel"]["ci_high"]


@pytest.mark.full  # evaluate.py in short: test_report_of_a_run_that_is_too_small_for_some_metrics
def test_report_for_people(report: Path):
    text = (report / "report.md").read_text()
    for word in (
        "## memorisation",
        "copy_rate",
        "120 generated images",
        "160 slices of 40 people",
        "needs at least 128",
    ):
        assert word in text, word
    for name in ("generated.png", "spectrum.png", "anatomy.png", "memorisation.png", "closest_pairs.png"):
        assert f"![{name}]({name})" in text and cv2.imread(str(report / name)).std() > 5


def test_folders_that_cannot_be_evaluated(data: Path, tmp_path: Path):
    flags = ["--data", data / "data", "--cache", data / "cache", "--out", tmp_path / "report"]

    def refused(*args: str | Path) -> str:
        done = run_any("evaluate.py", *args, *flags)
        assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "report").exists()
        return done.stderr

    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused("--images", tmp_path / "empty")
    assert "there is no file or folder" in refused("--images", tmp_path / "none")
    assert "leave out --images" in refused("--images", data / "generated", "--num-steps", "20")
    assert "there are no weights" in refused("--run", "none", "--checkpoints", tmp_path)
    assert "has no test/ folder" in refused("--images", data / "generated", "--held-out", "test")
    (tmp_path / "not.pth").write_bytes(b"no weights")
    assert "does not hold the weights" in refused(
        "--images", data / "generated", "--inception-weights", tmp_path / "not.pth"
    )
    assert "Inception" in refused("--images", data / "generated", "--inception-weights", tmp_path / "none.pth")


def test_without_a_run_it_is_adni_everywhere(trained: Path, phantoms: Path, tmp_path: Path, monkeypatch):
    """Also in the name that wandb gets, and in the report page that is written again."""
    import evaluate

    names: list[str] = []
    run = SimpleNamespace(log=lambda row, step: None, finish=lambda: None)
    wandb = SimpleNamespace(Settings=dict, init=lambda **how: names.append(how["name"]) or run, Image=str, Video=str)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    shutil.copytree(trained / "tiny", tmp_path / "adni")
    (tmp_path / "adni" / "report.html").unlink()
    cfg = EvaluateConfig(
        data=str(phantoms), checkpoints=str(tmp_path), cache=str(tmp_path / "cache"), num_images=16, count=16,
        resamples=10, wandb="offline", device="cpu",
    )  # fmt: skip
    with contextlib.suppress(UserError):  # so few images are too few for some of the sections
        evaluate.main(cfg)
    assert names == ["adni-evaluate"] and "Evidence" in (tmp_path / "adni" / "report.html").read_text()


def test_mixed_sizes_and_bad_files_are_said_and_left_out(sets, tmp_path: Path):
    folder = write(tmp_path / "mixed", sets[2].take(np.arange(10)))
    cv2.imwrite(str(folder / "AD" / "small_1.png"), np.full((32, 32), 9, np.uint8))
    (folder / "NC" / "torn_1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    data, problems = read_images(folder)
    pixels, names = data.images, data.class_names()
    assert pixels.shape == (10, SIDE, SIDE) and pixels.dtype == torch.uint8
    assert "1 of 12 files cannot be used" in problems[0] and "truncated" in problems[0]
    assert "10 of 64x64, 1 of 32x32" in problems[1] and "only those of 64x64 count" in problems[1]
    assert sorted(names) == sorted(CLASSES[y] for y in sets[2].labels[:10].tolist())
    assert set(read_images(folder / "AD")[0].class_names()) == {
        "AD"
    }  # a folder without classes below it: its own name is one
