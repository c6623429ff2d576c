"""Every kind of file that is read, damaged in thousands of ways: it is read, refused in a sentence, or made again.

All of it is seeded. A case fails with another exception, after five seconds of CPU, or where it takes far more memory
than its file is worth.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import resource
import signal
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import run_any
from safetensors.torch import save_file
from test_readers import AFFINE, VOXELS, classic, enhanced, packed

import predict
import readers
from conditions import draw_rows, in_words, learn_attribute, to_header
from config import DataConfig, PredictConfig
from dataset import (
    BadFile,
    carved_people,
    load_slices,
    load_splits,
    load_splits_as_trained,
    read_attributes,
    read_images,
    read_slice,
)
from dataset import scan as scan_folder
from modules import NoiseScheduler_Fast_DDPM, StableDiffusion, UNet, load_diffusion
from pictures import plot_curves
from readers import Unusable
from utils import UserError, read_jsonl
from vae import VAE, load_vae
from weights import file_hash, load_state, save_state, save_weights

CPU = torch.device("cpu")
HUGE = (65535, 40_000, 2**31 - 1, 2**32 - 1, 0, 1, 12_000)


class Hang(BaseException):
    """Not an Exception, so that nobody takes it for a damaged file."""


def memory(field: str) -> int:
    """Bytes: VmRSS now, VmHWM the most so far, VmSize of address space."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@pytest.fixture
def confined() -> Iterator[None]:
    """At most 2 GiB more address space, a watch on the peak of memory, and an alarm that `survive` sets."""

    def ring(*_: object) -> None:
        raise Hang

    old, limits = signal.signal(signal.SIGPROF, ring), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + 2**31, limits[1]))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
    signal.signal(signal.SIGPROF, old)


def survive(call: Callable[[], Any], case: object, counts: Counter) -> Any:
    """What the call gives, None where it refuses in the ways it may."""
    before, result = memory("VmHWM"), None
    signal.setitimer(signal.ITIMER_PROF, 5)  # of CPU time: others may be busy, too
    try:
        result = call()
        counts["read"] += 1
    except (UserError, BadFile, Unusable) as e:
        sentence = str(e)
        assert sentence and "\n" not in sentence and len(sentence) < 1000, (case, sentence)
        counts["refused"] += 1
    except OSError as e:
        assert e.filename, (case, repr(e))
        counts["refused"] += 1
    except (Exception, Hang) as e:
        raise AssertionError(f"case {case}: {type(e).__name__}: {e}") from e
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    assert memory("VmHWM") - before < 400 * 2**20, f"case {case} took {(memory('VmHWM') - before) >> 20} MiB"
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Flipped bits, a torn end, a piece moved, doubled or blanked, or a number replaced; often near the head."""
    out = bytearray(data)

    def place() -> int:
        return int(rng.integers(min(len(out), 64) if rng.random() < 0.5 else len(out)))

    for _ in range(rng.integers(1, 4)):
        if not out:
            break
        kind, i, j, n = rng.integers(6), place(), place(), int(rng.integers(1, 64))
        if kind == 0:
            for _ in range(rng.integers(1, 9)):
                out[place()] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del out[i:]
        elif kind == 2:
            out[i : i + n] = out[j : j + n]
        elif kind == 3:
            out[i:i] = out[j : j + n]
        elif kind == 4:
            out[i : i + n] = [b"\0", b"\xff"][rng.integers(2)] * n
        else:
            value, width = int(rng.choice(HUGE)), int(rng.choice([2, 4]))
            out[i : i + width] = (value % 256**width).to_bytes(width, ["little", "big"][rng.integers(2)])
    return bytes(out)


def resized(data: bytes, width: int, height: int) -> bytes:
    """The same picture file with other numbers in its header, and all checksums right."""
    out = bytearray(data)
    if data.startswith(b"\x89PNG"):
        out[16:24] = struct.pack(">II", width % 2**32, height % 2**32)
        out[29:33] = struct.pack(">I", zlib.crc32(bytes(out[12:29])))
    elif data.startswith(b"\xff\xd8"):
        i = next(i for i in range(len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC2))
        out[i + 5 : i + 9] = struct.pack(">HH", height % 2**16, width % 2**16)
    elif data.startswith(b"BM"):
        out[18:26] = struct.pack("<II", width % 2**32, height % 2**32)
    else:
        (ifd,) = struct.unpack("<I", data[4:8])
        for k in range(struct.unpack("<H", data[ifd : ifd + 2])[0]):
            entry = ifd + 2 + 12 * k
            (tag,) = struct.unpack("<H", data[entry : entry + 2])
            if tag in (256, 257):
                out[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, (width if tag == 256 else height) % 2**32)
    return bytes(out)


ODD = (
    -1, 0, 1, 3, 10**9, 10**18, 2**64, 1.5, float("nan"), float("inf"), 1e300, True, None, "", "x", "..", "../up",
    "/tmp/x", "a/b", "a\0b", "\ud800", "x" * 5000, [], {}, [[1]], [10**9] * 3, [-1], [0, 0], ["x"], {"x": 1}, [1] * 999,
)  # fmt: skip


def mutate_values(tree: Any, rng: np.random.Generator) -> Any:
    """A JSON value in which one to three places are missing, renamed, or something else altogether."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.integers(1, 4)):
        node, path = tree, []
        while isinstance(node, (dict, list)) and node and (not path or rng.random() < 0.8):
            key = list(node)[rng.integers(len(node))] if isinstance(node, dict) else int(rng.integers(len(node)))
            path.append((node, key))
            node = node[key]
        if not path:
            continue
        parent, key = path[-1]
        if rng.random() < 0.15:
            del parent[key]
        elif isinstance(parent, dict) and rng.random() < 0.1:
            parent[key + "_"] = parent.pop(key)
        else:
            parent[key] = ODD[rng.integers(len(ODD))]
    return tree


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def pictures() -> list[bytes]:
    """One of each kind that OpenCV reads here: grey, colour, with alpha, 16 bits, several compressions."""
    rng = np.random.default_rng(0)
    grey = cv2.GaussianBlur(rng.integers(1, 255, (48, 40)).astype(np.uint8), (5, 5), 0)
    colour, alpha = np.dstack([grey] * 3), np.dstack([grey] * 4)
    made = [cv2.imencode(ext, grey)[1] for ext in (".png", ".jpg", ".tiff", ".bmp")]
    made += [cv2.imencode(ext, colour)[1] for ext in (".png", ".jpg", ".tiff", ".bmp")]
    made += [cv2.imencode(ext, alpha)[1] for ext in (".png", ".tiff")]
    made += [cv2.imencode(ext, grey.astype(np.uint16) * 256)[1] for ext in (".png", ".tiff")]
    made += [cv2.imencode(".jpg", colour, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1]]
    made += [cv2.imencode(".tiff", grey, [cv2.IMWRITE_TIFF_COMPRESSION, c])[1] for c in (1, 8, 32773)]
    return [m.tobytes() for m in made]


def mangled_pictures(n: int) -> Iterator[bytes]:
    rng, whole = np.random.default_rng(1), pictures()
    for k in range(n):
        data = whole[k % len(whole)]
        if rng.random() < 0.25:
            width, height = (int(rng.choice([*HUGE, 40, 48])) for _ in range(2))
            data = resized(data, width, height)
        yield data if rng.random() < 0.1 else mutate(data, rng)


def test_fuzzed_pictures_are_read_or_refused(tmp_path: Path, confined: None):
    counts, path = Counter(), tmp_path / "x.png"
    for k, data in enumerate(mangled_pictures(2000)):
        path.write_bytes(data)
        got = survive(lambda: read_slice(path), k, counts)
        assert got is None or (got[0].dtype == np.uint8 and got[0].ndim == 2 and min(got[0].shape) >= 32), k
    assert counts["read"] > 200 and counts["refused"] > 200, counts  # damage that never or always shows tests nothing


def test_a_folder_of_fuzzed_pictures_is_decoded_or_listed(tmp_path: Path, confined: None):
    folder = tmp_path / "data" / "train" / "NC"
    folder.mkdir(parents=True)
    for k, data in enumerate(mangled_pictures(200)):
        (folder / f"p{k}_0.png").write_bytes(data)
    slices = scan_folder(tmp_path / "data", DataConfig.subject_regex)
    images, notes = survive(lambda: load_slices(tmp_path / "data", slices, 32, tmp_path / "cache"), "folder", Counter())
    assert len(images) == 200 and 20 < len(notes["bad"]) < 180
    assert all(images[[s.path for s in slices].index(path)].sum() == 0 for path, _ in notes["bad"])


# ---------------------------------------------------------------------------------------------------------------------
# Volumes


def written_by_nibabel(folder: Path, name: str) -> list[Path]:
    import nibabel

    kinds = {"a.nii": nibabel.Nifti1Image, "two.nii": nibabel.Nifti2Image, "a.mgh": nibabel.MGHImage}
    kinds |= {"pair.hdr": nibabel.Nifti1Pair, "old.hdr": nibabel.AnalyzeImage}
    nibabel.save(kinds[name](VOXELS, AFFINE), folder / name)
    return [folder / name]


def written_by_simpleitk(folder: Path, name: str) -> list[Path]:
    import SimpleITK

    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(VOXELS.T), str(folder / name), name.startswith("z"))
    return [folder / name]


def written_by_pydicom(folder: Path, name: str) -> list[Path]:
    """A file for each slice, or one for all, compressed if `name` says how; "bare" is without preamble."""
    how = {"implicit_vr": True, "little_endian": True}
    paths = [enhanced(folder / "all.dcm", [*range(9)])] if "many" in name else classic(folder, name != "bare", how)
    if syntax := name.removeprefix("many ") if name not in ("plain", "bare", "many") else "":
        for path in paths:
            packed(path, syntax)
    return paths


WHOLE: dict[str, Callable[[Path, str], list[Path]]] = {
    **dict.fromkeys(["a.nii", "two.nii", "a.mgh", "pair.hdr", "old.hdr"], written_by_nibabel),
    **dict.fromkeys(["a.nrrd", "z.nrrd", "a.nhdr", "a.mha", "z.mha", "a.mhd"], written_by_simpleitk),
    **dict.fromkeys(["plain", "bare", "many", "JPEGLosslessProcess14_1", "JPEGLSLossless"], written_by_pydicom),
    **dict.fromkeys(["JPEG2000Lossless", "RLELossless", "many JPEG2000Lossless"], written_by_pydicom),
}


def fuzz_volumes(folder: Path, name: str, n: int) -> Counter:
    """Read n damaged files of one format. Those for the child process are read by hundreds, as a child costs 0.5 s."""
    counts, rng = Counter(), np.random.default_rng(len(name) + n)
    whole = [(p, p.read_bytes()) for p in WHOLE[name](folder, name)]
    damaged = []
    for k in range(n):
        path, data = whole[k % len(whole)]
        damaged.append(path.with_name(f"{k}-{path.name}"))
        if (voxels := path.with_suffix(".img")).exists():
            damaged[-1].with_suffix(".img").hardlink_to(voxels)
        data = mutate(data, rng)
        damaged[-1].write_bytes(gzip.compress(data, 1) if path.suffix in (".nii", ".mgh") and k % 4 == 0 else data)
    for path in damaged:
        survive(partial(readers.kind_of, path), path, Counter())
    native = whole[0][0].suffix in (".nrrd", ".nhdr", ".mha", ".mhd")
    if native or "J" in name or "RLE" in name:
        for path in damaged if not native else ():
            survive(partial(readers.scan_dicom, path), path, Counter())
            with contextlib.suppress(AssertionError):  # read_series names a file with whatever is raised
                survive(partial(readers.frames_of, path), path, Counter())
        for i in range(0, n, 100):
            for _, voxels, _ in survive(lambda i=i: [*readers.in_child(damaged[i : i + 100])], i, Counter()):
                counts["refused" if isinstance(voxels, Unusable) else "read"] += 1
                counts["crashed"] += "crashed" in str(voxels)
    elif len(whole) > 1:  # a damaged file among those of its series
        for k, path in enumerate(damaged):
            survive(partial(readers.scan_dicom, path), path, Counter())
            others = [p for p, _ in whole if p != whole[k % len(whole)][0]]
            survive(partial(readers.read_series, [path, *others]), path, counts)
    else:
        for path in damaged:
            volume = survive(partial(readers.read_volume, path), path, counts)
            assert volume is None or (volume.voxels.dtype == np.float32 and volume.voxels.ndim == 3), path
            assert volume is None or abs(np.linalg.det(volume.affine)) > 1e-9, path
    return counts


@pytest.mark.parametrize("name", WHOLE)
def test_fuzzed_volumes_are_read_or_refused(tmp_path: Path, confined: None, name: str):
    counts = fuzz_volumes(tmp_path, name, 100)
    assert counts["read"] > 5 and counts["refused"] > 5, counts


@pytest.mark.full
@pytest.mark.parametrize("name", WHOLE)
def test_many_fuzzed_volumes(tmp_path: Path, confined: None, name: str):
    """A thousand of each format were tried once by hand, which takes minutes."""
    counts = fuzz_volumes(tmp_path, name, 300)
    assert counts["read"] + counts["refused"] == 300


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


ATTRIBUTES = [learn_attribute("group", ["AD", "NC"]), learn_attribute("age", ["60", "70", "85.5"])]


def networks() -> tuple[VAE, StableDiffusion]:
    torch.manual_seed(0)
    return VAE(16, 4, 2, (8, 8), 1), StableDiffusion(UNet(2, 4, (8, 8), 1, (4,), (2, 0)), NoiseScheduler_Fast_DDPM())


def metas(vae: VAE, model: StableDiffusion) -> dict[str, dict]:
    common = {"format": 1, "classes": ["AD", "NC"], "config": {"seed": 0}, "data": "2 slices", "commit": "x"}
    return {
        "vae": {"kind": "vae", "model": vae.config, "finished": True, **common},
        "diffusion": {
            "kind": "diffusion", "model": model.unet.config, "attributes": to_header(ATTRIBUTES),
            "scheduler": model.scheduler.config, "prediction": "v",
            "vae": "0" * 12, "epoch": 1, **common,
        },
    }  # fmt: skip


def use(path: Path, kind: str) -> None:
    """Load and put to work: what is accepted must also run, and say something finite."""
    if kind == "vae":
        vae, meta = load_vae(path, CPU)
        assert vae.decode(torch.zeros(1, *vae.latent_shape)).isfinite().all()
    else:
        model, meta = load_diffusion(path, CPU)
        shape = [model.unet.config["in_channels"], 4, 4]
        few, y = model.scheduler.timesteps.tolist()[::4], draw_rows(model.attributes, {}, 0, [0, 1])
        z = model.generate(shape, 0, [0, 1], y, timesteps=few)
        assert z.isfinite().all()
        names = [text for a in model.attributes for text in (a.name, *a.values, *in_words(model.attributes, y[0]))]
        assert len(y[0]) == len(model.unet.conditions) and not any("/" in text for text in names)
    for name in meta.get("classes", []):
        assert (Path("out") / "train" / name).resolve().parent == Path("out/train").resolve(), name


def test_fuzzed_weights_are_refused(tmp_path: Path, confined: None):
    """Damaged files of our own: the checksum tells, whatever was hit."""
    counts, rng, path = Counter(), np.random.default_rng(2), tmp_path / "best.safetensors"
    vae, model = networks()
    whole = {}
    for kind, module in (("vae", vae), ("diffusion", model)):
        save_weights(path, module, metas(vae, model)[kind])
        whole[kind] = path.read_bytes()
        use(path, kind)
    for k in range(170):
        kind = ("vae", "diffusion")[k % 2]
        head = 8 + struct.unpack("<Q", whole[kind][:8])[0] if k % 4 < 2 else 0  # or in the tensors alone
        data = whole[kind][:head] + mutate(whole[kind][head:], rng)
        path.write_bytes(data)
        survive(partial(use, path, kind), k, counts)
        assert counts["read"] == 0 or data == whole[kind], f"case {k}: damage went unnoticed"
        counts["read"] = 0
    assert counts["refused"] > 160, counts


def test_weights_of_others_with_fuzzed_headers_are_refused_or_work(tmp_path: Path, confined: None):
    """Whole files without a checksum, as older versions and other people write them, that ask for anything."""
    counts, rng, path = Counter(), np.random.default_rng(3), tmp_path / "best.safetensors"
    vae, model = networks()
    for k in range(250):
        kind, module = (("vae", vae), ("diffusion", model))[k % 2]
        meta = mutate_values(metas(vae, model)[kind], rng)
        save_file(module.state_dict(), path, {"meta": json.dumps(meta)})
        survive(partial(use, path, kind), (k, str(meta)[:600]), counts)
    assert counts["read"] > 20 and counts["refused"] > 100, counts
    for k in range(60):  # the header's own words: names, dtypes, shapes, offsets
        kind, module = (("vae", vae), ("diffusion", model))[k % 2]
        save_file(module.state_dict(), path, {"meta": json.dumps(metas(vae, model)[kind])})
        data = path.read_bytes()
        (n,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + n])
        entry = header[list(header)[rng.integers(1, len(header))]]
        if k % 3:
            entry["dtype"] = ["I32", "U32", "F16", "BF16", "C64", "BOOL", "F8_E4M3", "I64", "F64"][rng.integers(9)]
        else:
            header = mutate_values(header, rng)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n :])
        survive(partial(use, path, kind), (k, str(entry)), counts)


def test_fuzzed_states_give_way_to_the_one_before(tmp_path: Path, confined: None, capsys: pytest.CaptureFixture):
    counts, rng, path = Counter(), np.random.default_rng(4), tmp_path / "last.pt"
    vae, _ = networks()
    for step in (1, 2):
        save_state(path, {"step": step, "model": vae.state_dict(), "config": {"seed": 0}})
    whole, weights = path.read_bytes(), vae.state_dict()
    for k in range(100):
        data = mutate(whole, rng)
        path.write_bytes(data)
        state = survive(lambda: load_state(path), k, counts)
        assert state["step"] in (1, 2), k
        assert all(torch.equal(state["model"][name], weights[name]) for name in weights), f"case {k} was believed"
    assert capsys.readouterr().err.count("cannot be read") > 80


# ---------------------------------------------------------------------------------------------------------------------
# Tables and notes


TEXT = (b"\0", b"\xff\xfe", b"\xe9", b'"', b",", b"\n", b"\r", b"-", b"../", b"/etc/", b"9" * 5000, b"x" * 200_000, b"")


def mutate_text(data: bytes, rng: np.random.Generator) -> bytes:
    """Damage to text: what `mutate` does, or an odd piece put somewhere, or a field or a line that is gone."""
    kind = rng.integers(4)
    if kind == 0:
        return mutate(data, rng)
    sep = [b"\n", b",", b'"', b":"][rng.integers(4)]
    parts = data.split(sep)
    i = int(rng.integers(len(parts)))
    if kind == 1:
        del parts[i]
    else:
        parts[i] = TEXT[rng.integers(len(TEXT))] + parts[i] * (kind - 2)
    return sep.join(parts)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to train on, its subjects.csv, and a folder of generated images with its manifest."""
    home = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)

    def picture(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), rng.integers(1, 255, (32, 32)).astype(np.uint8))

    for label in ("AD", "NC"):
        for i in range(4):
            picture(home / "data" / "train" / label / f"{label}{i}_0.png")
    (home / "data" / "subjects.csv").write_text("scan,patient\nAD0,A\nAD1,A\nNC0,B\nNC1,C\n")
    rows = [f"train/{('AD', 'NC')[k % 2]}/s7i{k:05d}_0.png" for k in range(6)]
    for row in rows:
        picture(home / "out" / row)
    lines = [f"{row},{row[6:8]},7,{k},{'0' * 12}" for k, row in enumerate(rows)]
    (home / "out" / "manifest.csv").write_text("\n".join(["file,class,seed,index,checkpoint", *lines]) + "\n")
    picture(home / "secret.png")
    return home


def fuzz_text(path: Path, call: Callable[[], Any], n: int, seed: int, check: Callable[[Any], bool]) -> Counter:
    counts, rng, whole = Counter(), np.random.default_rng(seed), path.read_bytes()
    for k in range(n):
        data = mutate_text(whole, rng)
        path.write_bytes(data)
        got = survive(call, (k, data[:300]), counts)
        assert got is None or check(got), (k, data[:300], got)
    path.write_bytes(whole)
    return counts


def test_fuzzed_subjects_and_manifests(small: Path, confined: None):
    data, out = small / "data", small / "out"
    counts = fuzz_text(
        data / "subjects.csv", lambda: scan_folder(data, DataConfig.subject_regex), 100, 5,
        lambda slices: len(slices) == 8 and all(s.person and isinstance(s.person, str) for s in slices),
    )  # fmt: skip
    assert counts["refused"] > 5 and counts["read"] > 5, counts
    (data / "subjects.csv").unlink()
    slices = scan_folder(data, DataConfig.subject_regex)
    lines = [f"{Path(s.path).name},{60 + i},{'FM'[i % 2]}" for i, s in enumerate(slices)]
    (data / "attributes.csv").write_text("\n".join(["file,age,sex", *lines]) + "\n")
    counts = fuzz_text(
        data / "attributes.csv", lambda: read_attributes(data, slices), 100, 9,
        lambda rows: len(rows) == 8 and all(type(v) is str for row in rows for v in row.values()),
    )  # fmt: skip
    assert counts["refused"] > 5 and counts["read"] > 5, counts
    counts = fuzz_text(
        out / "manifest.csv", lambda: read_images(out), 100, 6,
        lambda got: 1 <= len(got[0]) <= 12 and all(type(c) is str for c in got[0].class_names()),
    )  # fmt: skip
    assert counts["refused"] > 5 and counts["read"] > 5, counts
    counts = fuzz_text(
        out / "manifest.csv", lambda: predict.read_manifest(out, lambda k, row: True), 100, 7,
        lambda rows: all(type(k) is int and 0 <= k < 10**9 and k == row[3] % 10**9 for k, row in rows.items()),
    )  # fmt: skip
    assert counts["read"] == 100, counts  # what is unreadable is drawn again, so there is nothing to refuse


def test_fuzzed_commands_are_refused(small: Path, tmp_path: Path, confined: None):
    command = {"run": "tiny", "seed": 7, "class_name": ["AD"], "timesteps": [0, 999], "eta": 0.0, "guidance": 1.0}
    record = tmp_path / "command.json"
    predict.claim_folder(tmp_path, command)
    counts, rng, whole = Counter(), np.random.default_rng(8), record.read_bytes()
    for k in range(60):
        data = mutate_text(whole, rng) if k % 2 else json.dumps(mutate_values(command, rng)).encode()
        record.write_bytes(data)
        survive(lambda: predict.claim_folder(tmp_path, command), (k, data[:300]), counts)
        assert record.read_bytes() == data or json.loads(data) == command, k
    assert counts["refused"] > 50, counts


def test_fuzzed_caches_are_made_again(small: Path, tmp_path: Path, confined: None):
    """Whatever was hit, notes or pixels, the slices that come back are the right ones."""
    slices = scan_folder(small / "data", DataConfig.subject_regex)
    counts, rng = Counter(), np.random.default_rng(9)

    def load() -> tuple[torch.Tensor, dict]:
        return load_slices(small / "data", slices, 32, tmp_path)

    images, notes = load()
    images = images.clone()
    for k in range(100):
        (path,) = tmp_path.glob("*.u8" if k % 4 == 0 else "slices-*.json")
        data = path.read_bytes()
        path.write_bytes(mutate_text(data, rng) if k % 4 else mutate(data, rng))
        got = survive(load, (k, path.read_bytes()[:300]), counts)
        assert torch.equal(got[0], images) and got[1] == notes, (k, path.name)


def test_fuzzed_logs(tmp_path: Path, confined: None):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": k, "epoch": k / 2, "loss/train": 1 / (k + 1), "loss/val": 2.0, "PSNR/val": 30.0} for k in range(5)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    counts = fuzz_text(path, lambda: read_jsonl(path), 60, 10, lambda got: all(type(r["step"]) is int for r in got))
    assert counts["read"] == 60
    rng = np.random.default_rng(11)
    for k in range(20):  # and what was read can be drawn
        path.write_bytes(mutate_text("".join(json.dumps(mutate_values(r, rng)) + "\n" for r in rows).encode(), rng))
        got = survive(lambda: read_jsonl(path), k, counts)
        survive(partial(plot_curves, got, tmp_path / "curves.png"), (k, path.read_bytes()[:600]), counts)


def test_fuzzed_rules_of_a_run(small: Path, tmp_path: Path, confined: None):
    """The header of a run's weights says how its data was split."""
    splits, _ = load_splits(DataConfig(data=str(small / "data"), cache=str(tmp_path)), 32)
    rules = {"subject_regex": DataConfig.subject_regex, "val_fraction": 0.1, "skip_bad_files": False, "seed": 0}
    meta = {"config": rules, "data": splits["train"].summary(), "held_out": carved_people(splits)}
    counts, rng = Counter(), np.random.default_rng(12)
    for k in range(100):
        wrong = mutate_values(meta, rng)
        survive(partial(load_splits_as_trained, str(small / "data"), str(tmp_path), wrong, 32), (k, wrong), counts)
    assert counts["refused"] > 50, counts


# ---------------------------------------------------------------------------------------------------------------------
# As a person meets it


def test_damage_as_a_person_meets_it(tmp_path: Path):
    """A handful by whole scripts: exit code 0, or 2 and one sentence."""
    run, out, rng, codes = tmp_path / "runs" / "tiny", tmp_path / "out", np.random.default_rng(13), Counter()
    files = {"vae": run / "vae" / "best.safetensors", "diffusion": run / "diffusion" / "best.safetensors"}
    modules = dict(zip(files, networks()))
    for kind, module in modules.items():
        meta = metas(*modules.values())[kind]
        save_weights(files[kind], module, meta | {"vae": file_hash(files["vae"])} if kind == "diffusion" else meta)
    predict.main(PredictConfig(checkpoints=str(run.parent), run="tiny", num_images=2, out=str(out)))
    command = ["predict.py", "--checkpoints", run.parent, "--run", "tiny", "--num-images", "2", "--out", out]
    for path in (out / "manifest.csv", out / "command.json", files["diffusion"]):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if path.suffix == ".json" else mutate(whole, rng))
        (out / "README.md").unlink(missing_ok=True)
        done = run_any(*command)
        path.write_bytes(whole)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in done.stderr and done.returncode == 2 * len(errors) <= 2, (path, done.stderr)
        codes[done.returncode] += 1
    assert codes == {0: 1, 2: 2}, codes  # a damaged manifest costs nothing but the drawing of its images
