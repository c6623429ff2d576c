"""Synthetic, T1-weighted-like axial brain slices with known anatomy, drawn from a seed: no patient, no download.

    python phantom.py data/phantom --people 200      # draw OUT/{train,val}/{AD,NC}/P0001_03.png and OUT/anatomy.csv
    python phantom.py older --people 200 --given age=85    # the same people, all of them 85
    python phantom.py samples --measure              # ventricle fraction per class of any folder of brain slices

The two classes only borrow their names: "AD" people have, on average, wider ventricles, wider sulci and a thinner
cortex than "NC" people, and the classes overlap. Older people differ from younger ones in the same three signs, and men
have larger brains than women. Use them to test a pipeline, never to say anything about a disease.

Everything is drawn in head coordinates: x right, y towards the back of the head, 1 = half the head's length.
Sulci are curves. Every pixel's distance to the nearest curve says what it shows: fluid within the sulcus, then grey
matter as far as the cortex is thick, then white matter. So the cortex folds around every curve.

Images smaller than 128 pixels have fewer and wider folds, as few as half of them from 64 pixels down: narrower ones
would be lost between pixels. The person, the outline and everything deep in the brain stay the same at every size.
"""

import csv
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from anatomy import cohens_d, ventricle_fraction

CLASSES = ("AD", "NC")
SEXES = ("F", "M")
AGES = (55.0, 90.0)  # years
DRAWING = 3  # counted up when the same seed draws other pictures, so that no old data set is taken for a new one
WM, GM, CSF = 203.0, 128.0, 36.0  # grey levels of the three tissues before bias and noise

# Lateral ventricle at four levels, low to high, by 11 stations front to back: y, x of the medial edge, width.
_LEVELS = np.array([0.0, 0.33, 0.67, 1.0])
_VENTRICLE = np.array(
    [
        [-0.44, -0.39, -0.33, -0.26, -0.17, 0.05, 0.18, 0.23, 0.31, 0.41, 0.52],
        [0.155, 0.090, 0.050, 0.028, 0.020, 0.10, 0.22, 0.23, 0.25, 0.265, 0.25],
        [0.0, 0.045, 0.065, 0.060, 0.012, 0.0, 0.0, 0.085, 0.105, 0.075, 0.0],
        [-0.48, -0.42, -0.34, -0.26, -0.15, 0.05, 0.16, 0.21, 0.28, 0.36, 0.44],
        [0.165, 0.085, 0.032, 0.018, 0.016, 0.04, 0.10, 0.14, 0.19, 0.235, 0.28],
        [0.0, 0.065, 0.090, 0.085, 0.040, 0.0, 0.015, 0.070, 0.090, 0.070, 0.0],
        [-0.47, -0.40, -0.32, -0.22, -0.10, 0.0, 0.10, 0.18, 0.25, 0.32, 0.38],
        [0.150, 0.065, 0.022, 0.015, 0.015, 0.02, 0.042, 0.085, 0.135, 0.185, 0.23],
        [0.0, 0.075, 0.095, 0.092, 0.078, 0.058, 0.052, 0.060, 0.065, 0.055, 0.0],
        [-0.40, -0.34, -0.28, -0.20, -0.10, 0.0, 0.06, 0.11, 0.16, 0.21, 0.26],
        [0.115, 0.060, 0.032, 0.022, 0.020, 0.026, 0.04, 0.06, 0.09, 0.125, 0.165],
        [0.0, 0.065, 0.092, 0.105, 0.108, 0.102, 0.095, 0.085, 0.072, 0.050, 0.0],
    ]
).reshape(4, 3, 11)
_CAUDATE = np.array(  # thickness of the caudate beside the same stations
    [
        [0.0, 0.040, 0.085, 0.100, 0.060, 0, 0, 0, 0, 0, 0],
        [0.0, 0.045, 0.090, 0.095, 0.060, 0, 0, 0, 0, 0, 0],
        [0.0, 0.030, 0.058, 0.062, 0.055, 0.045, 0.025, 0, 0, 0, 0],
        [0.0, 0.015, 0.030, 0.036, 0.036, 0.032, 0.022, 0.01, 0, 0, 0],
    ]
)
_PUTAMEN = np.array(
    [(0.21, -0.36), (0.32, -0.29), (0.375, -0.14), (0.375, 0.0), (0.315, 0.17), (0.285, 0.05), (0.255, -0.06),
     (0.215, -0.22)]
)  # fmt: skip
_INSULA = np.array([(0.60, -0.40), (0.49, -0.31), (0.455, -0.16), (0.465, 0.0), (0.475, 0.12), (0.54, 0.20)])
_STEM = np.array([(0.90, -0.20), (0.74, -0.16), (0.62, -0.12), (0.52, -0.13), (0.465, -0.10)])


class Unusable(ValueError):
    """A request that cannot be met; its text is one sentence for the person who made it."""


def _smooth(points: np.ndarray, n: int, closed: bool = False) -> np.ndarray:
    """Resample rows of points [k, c] to n rows along a cubic curve."""
    import cv2

    pad = 3
    wrapped = np.concatenate([points[-pad:], points, points[:pad]]) if closed else points
    m = n * len(wrapped) // len(points)
    curve = cv2.resize(wrapped.astype(np.float32), (points.shape[1], m), interpolation=cv2.INTER_CUBIC)
    return curve[pad * n // len(points) :][:n] if closed else curve


def _between(z: float, keys: np.ndarray) -> np.ndarray:
    """Keys given at _LEVELS, interpolated at level z in [0, 1]."""
    i = int(np.clip(np.searchsorted(_LEVELS, z) - 1, 0, len(_LEVELS) - 2))
    t = float(np.clip((z - _LEVELS[i]) / (_LEVELS[i + 1] - _LEVELS[i]), 0, 1))
    return keys[i] * (1 - t) + keys[i + 1] * t


class _Person:
    """All random numbers of one person but the scanner's noise. Its slices differ by their level alone."""

    OUTER, MEDIAL = 22, 10  # sulci per hemisphere from the outline, and from the interhemispheric fissure

    def __init__(self, seed: int, index: int, group: str = "", age: float | None = None, sex: str = ""):
        """A group, age or sex that is given replaces the person's own and changes nothing but what depends on it."""
        from scipy.ndimage import gaussian_filter

        # The random numbers are the same whatever is given: a person's noise, folds and shape stay.
        self.rng = rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
        self.name = group or CLASSES[index % 2]
        own_age, own_sex = round(rng.uniform(*AGES), 1), SEXES[rng.integers(2)]
        self.age, self.sex = own_age if age is None else age, sex or own_sex
        # One latent severity moves all three signs, and so do the years; each sign has its own noise, so that the signs
        # agree only in part.
        severity = (0.75 if self.name == "AD" else -0.75) + rng.normal(0, 0.6)
        years = self.age - sum(AGES) / 2
        self.ventricle = float(np.exp(0.05 + 0.23 * severity + 0.015 * years + rng.normal(0, 0.11)))
        self.sulcus = float(np.clip(0.0085 + 0.0014 * severity + 1e-4 * years + rng.normal(0, 0.0018), 0.004, 0.018))
        self.cortex = float(np.clip(0.041 - 0.0013 * severity - 8e-5 * years + rng.normal(0, 0.0018), 0.033, 0.05))
        self.size = 0.362 * float(np.clip(rng.normal(1.025 if self.sex == "M" else 0.975, 0.02), 0.9, 1.09))
        self.aspect = float(np.clip(rng.normal(0.80, 0.022), 0.74, 0.86))
        self.angle = np.deg2rad(np.clip(rng.normal(0, 2.5), -6, 6))
        self.shift = np.clip(rng.normal(0, 0.008, 2), -0.02, 0.02)
        self.egg = rng.normal([0.05, 0.0], [0.02, 0.01])  # narrower front; left-right asymmetry
        self.asymmetry = rng.normal(0, 0.10)
        self.contrast, self.noise = rng.uniform(0.92, 1.06), rng.uniform(2.5, 5.5)
        self.bias = rng.normal(0, [0.035, 0.035, 0.03, 0.03, 0.02])
        self.level = rng.uniform(-0.06, 0.06)
        # Fold noise [level, y, x, channel]: displacement of curves (2), width of sulci.
        folds = gaussian_filter(rng.standard_normal((6, 11, 11, 3)), (0, 0.7, 0.7, 0), mode="wrap")
        self.folds = (folds / folds.std((0, 1, 2))).astype(np.float32)
        self.traits = self.draw_traits(rng)
        # What all people have in common: every sulcus has a place and a shape of its own that people vary.
        self.common = self.draw_traits(np.random.default_rng(1))

    def draw_traits(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Random traits of all sulci of both hemispheres, each [n], and wiggle [n, 3]."""
        n = 2 * (self.OUTER + self.MEDIAL)
        traits = {"depth": rng.lognormal(0, 0.25, n), "tilt": rng.normal(0, 0.2, n), "place": rng.uniform(-1, 1, n)}
        traits |= {"curl": rng.normal(0, 0.5, n), "wiggle": rng.uniform(0, 1, (n, 3))}
        return traits | {"fork": rng.uniform(0.45, 0.9, n), "side": rng.choice([-1.0, 1.0], n)}

    def field(self, z: float) -> np.ndarray:
        """The fold noise at level z: [11, 11, 3], about unit variance."""
        i, f = divmod((z * 0.8 + 0.1) * (len(self.folds) - 1), 1)
        i = int(i)
        return (self.folds[i] * (1 - f) + self.folds[i + 1] * f) / np.float32(np.hypot(1 - f, f))

    def outline(self, theta: np.ndarray, z: float) -> np.ndarray:
        """Points of the head's outline at angles theta from the front (positive: right): [n, 2]."""
        y = -np.cos(theta)
        x = np.sin(theta)
        half = self.aspect * (1 - 0.03 * z) * (1 + self.egg[0] * y + self.egg[1] * np.sign(x))
        # A little squarer than an ellipse, as heads are; the temporal lobe bulges at low levels.
        bulge = 1 + 0.04 * (1 - z) * np.exp(-(((y - 0.15) / 0.35) ** 2))
        x = np.sign(x) * np.abs(x) ** 0.86 * half * bulge
        return np.stack([x, y * (1 - 0.02 * z)], -1)

    def sulci(self, z: float, coarse: float) -> tuple[list[np.ndarray], np.ndarray]:
        """All sulci at level z: a list of curves, each [points, 2], and their mouths on the outline, [2, n].

        A mouth is the angle where a sulcus opens and how wide, in [0, 1]. With `coarse` 1 there are OUTER + MEDIAL
        sulci in each hemisphere, with 2 half as many.
        """
        o, m = round(self.OUTER / coarse), round(self.MEDIAL / coarse)
        n = o + m
        medial = ((np.arange(m) + 0.5) * self.MEDIAL / m).astype(int)  # which of the MEDIAL places are left
        curves, mouths = [], []
        s = np.linspace(0, 1, 14)
        # Where folds are wide, people differ less from what they share, a tenth as much in small images: a network that
        # is trained for minutes can learn where they are.
        own = 1 - 0.9 * (coarse - 1)
        t = {name: own * mine + (1 - own) * self.common[name] for name, mine in self.traits.items()}
        t["side"] = np.sign(t["side"])
        for h, sign in enumerate((1.0, -1.0)):
            k = h * (self.OUTER + self.MEDIAL) + np.concatenate([np.arange(o), self.OUTER + medial])
            wave = np.sin(2 * np.pi * (t["wiggle"][k, 0] + (0.25 + 0.35 * t["wiggle"][k, 1]) * z))
            # Around the outline deep and shallow sulci alternate; front to back along the fissure.
            theta = (np.arange(o) + 0.5 + 0.28 * t["place"][k][:o] + 0.12 * wave[:o]) / o * (np.pi - 0.24) + 0.12
            start = self.outline(sign * theta, z)
            y = np.concatenate([np.linspace(-0.93, -0.60, 4), np.linspace(0.47, 0.93, 6)])[medial]
            y = y + 0.022 * t["place"][k][o:] + 0.008 * wave[o:]
            start = np.concatenate([start, np.stack([np.zeros(m), y], -1)])
            aim = start[:o] * [0.25, 0.45] - start[:o]  # inwards, towards the middle of the hemisphere
            heading = np.concatenate([np.arctan2(aim[:, 1], aim[:, 0]), np.where(sign > 0, 0.0, np.pi) * np.ones(m)])
            base = np.concatenate([np.where(np.arange(o) % 2, 0.10, 0.27), np.where(np.arange(m) % 2, 0.075, 0.125)])
            length = base * t["depth"][k] * (1 + 0.35 * wave)
            length[:o] *= 0.6 + 0.4 * np.sin(theta)  # shallower at the poles, where neighbours would meet
            length = np.clip(length, 0.02, np.where(np.arange(n) < o, 0.36, 0.2))
            bend = t["curl"][k, None] * s + 0.4 * np.sin(2 * np.pi * (t["wiggle"][k, 2:3] + 1.2 * s))
            path = heading[:, None] + t["tilt"][k, None] + bend
            step = np.stack([np.cos(path), np.sin(path)], -1) * (length / len(s))[:, None, None]
            trunk = start[:, None] + np.cumsum(step, 1) - step[:, :1]
            # A side branch makes the T and Y shapes of real sulci.
            at = (t["fork"][k] * (len(s) - 1)).astype(int)
            turn = path[np.arange(n), at][:, None] + (t["side"][k] * 1.15)[:, None] - 0.6 * t["side"][k][:, None] * s
            step = np.stack([np.cos(turn), np.sin(turn)], -1) * (0.38 * length / len(s))[:, None, None]
            branch = trunk[np.arange(n), at][:, None] + np.cumsum(step, 1)
            curves += list(trunk) + list(branch[length > 0.1])
            mouths.append(np.stack([sign * theta, np.minimum(length[:o] * 6, 1)]))
        return curves, np.concatenate(mouths, 1)


def _outline_and_curves(p: _Person, z: float, coarse: float, sulcus: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """The outline of the brain [360, 2] at level z, and the curves of sulci and fissure, in head coordinates.

    The outline is dented where a sulcus or the fissure opens; `sulcus` is half the width of one.
    """
    curves, mouths = p.sulci(z, coarse)
    mouths = np.concatenate([mouths, [[0, np.pi], [1.5, 1.5]]], 1)
    theta = np.linspace(-np.pi, np.pi, 360, endpoint=False)
    gap = np.abs((theta[:, None] - mouths[:1] + np.pi) % (2 * np.pi) - np.pi)
    dents = (np.exp(-((gap / (0.04 * coarse)) ** 2)) * mouths[1]).max(1)
    hull = p.outline(theta, z) * (1 - (0.018 + sulcus) * dents[:, None])
    bow = np.linspace(-1, 1, 9)
    # The interhemispheric fissure ends on the corpus callosum in front and behind.
    for end, sign in ((-0.56 + 0.05 * z, 1), (0.40 - 0.04 * z, -1)):
        curves.append(np.stack([np.zeros(20), np.linspace(-1.1 * sign, end, 20)], -1))
        curves.append(np.stack([0.075 * bow, end + sign * 0.035 * (bow**2)], -1))
    return hull, curves


def _deep_structures(p: _Person, z: float) -> tuple[list[np.ndarray], ...]:
    """Shapes of ventricles, caudates, putamina and thalami at level z, each [points, 2] in head coordinates.

    Wide ventricles push their neighbours aside.
    """
    stations, beside = _between(z, _VENTRICLE), _between(z, _CAUDATE)
    ventricles, caudates, putamina, thalami = [], [], [], []

    def bands(edge: np.ndarray, width: np.ndarray) -> list[np.ndarray]:
        """Shapes from edge [n, 2] to edge + width [n] sideways, cut where the width vanishes."""
        runs = np.split(np.arange(len(edge)), np.flatnonzero(np.diff(width > 0.004)) + 1)
        far = edge + width[:, None] * [1, 0]
        return [np.concatenate([edge[i], far[i[::-1]]]) for i in runs if len(i) > 1 and width[i[0]] > 0.004]

    for sign in (1, -1):
        grow = p.ventricle * (1 + sign * p.asymmetry)
        wide = stations[2] * grow + 0.012 * max(grow - 1, 0) * (stations[2] > 0)
        edge = _smooth(np.stack([stations[1], stations[0] * (0.9 + 0.1 * grow), wide, beside], -1), 66)
        ventricles += [band * [sign, 1] for band in bands(edge[:, :2], edge[:, 2])]
        caudates += [band * [sign, 1] for band in bands(edge[:, :2], (edge[:, 2] + edge[:, 3]) * (edge[:, 3] > 0.004))]
        small = np.clip(1.9 * (0.72 - z), 0, 1) ** 0.5
        push = [0.03 * (grow - 1), 0]
        if small > 0.15:
            middle = np.array([0.30, -0.09])
            putamina.append(((_smooth(_PUTAMEN, 48, True) - middle) * small + middle + push) * [sign, 1])
        small = np.clip(2.2 * (0.62 - z), 0, 1) ** 0.5
        if small > 0.15:
            t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
            oval = np.stack([0.105 * np.cos(t) - 0.035 * np.sin(t), 0.17 * np.sin(t)], -1) * small
            thalami.append((oval * [-1, 1] + [0.14, 0.03] + push) * [sign, 1])
    third = 0.014 * p.ventricle * np.clip(1.6 - 4 * z, 0, 1)
    if third > 0.002:
        t = np.linspace(0, 2 * np.pi, 32, endpoint=False)
        ventricles.append(np.stack([third * np.cos(t), 0.02 + 0.14 * np.sin(t)], -1))
    return ventricles, caudates, putamina, thalami


def _scan(p: _Person, image: np.ndarray, size: int) -> np.ndarray:
    """What this person's scanner makes of the tissues: bias field, point spread, Rician noise; float32 [h, w]."""
    import cv2

    v, u = (np.linspace(-1, 1, n, dtype=np.float32) for n in image.shape)
    v = v[:, None]
    b = p.bias.astype(np.float32)
    image *= 1 + b[0] * u + b[1] * v + b[2] * u * u + b[3] * v * v + b[4] * u * v
    image = cv2.GaussianBlur(image, (0, 0), max(0.6 * size / 256, 0.2))
    real, imaginary = p.rng.standard_normal((2, *image.shape), np.float32) * np.float32(p.noise)
    return np.sqrt((image + real) ** 2 + imaginary**2)


def _draw_slice(p: _Person, z: float, size: int) -> tuple[np.ndarray, dict]:
    """One slice at level z in [0, 1]: the image, uint8 [size, size], and its true areas by name.

    Shapes are drawn on a canvas with k x k pixels for every pixel of the image, then averaged.
    """
    import cv2

    # In a small image the folds of a real brain would be as narrow as a pixel, so it gets fewer, wider ones: `coarse`
    # is 1 from 128 pixels up and 2 from 64 down.
    coarse = min(max(128 / size, 1), 2)

    # --- canvas and helpers
    k = -(-384 // size)
    mx, my = int(size * 0.13), int(size * 0.08)
    w, h = (size - 2 * mx) * k, (size - 2 * my) * k
    scale = p.size * size * k  # canvas pixels per head unit
    sulcus, cortical = p.sulcus + 0.010 * (coarse - 1), p.cortex * (0.5 + 0.5 * coarse)
    field = p.field(z)
    c, s = np.cos(p.angle), np.sin(p.angle)
    turn = np.array([[c, -s], [s, c]]) * scale
    centre = np.array([w, h]) / 2 + p.shift * size * k

    def place(points: np.ndarray) -> np.ndarray:
        """Head coordinates to canvas pixels in 1/16, displaced by the fold noise (less so near the middle)."""
        at = ((points + 1.1) / 2.2 * 10).astype(np.float32)
        push = cv2.remap(field[..., :2], at[:, 0], at[:, 1], cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
        weight = 0.03 * np.clip(np.hypot(points[:, :1] * 1.2, points[:, 1:] * 0.5), 0.1, 0.8)
        return np.round((((points + push.reshape(-1, 2) * weight) @ turn.T) + centre) * 16).astype(np.int32)

    def cover(painted: list[tuple[list[np.ndarray], int]]) -> np.ndarray:
        """Antialiased uint8 canvas of (closed shapes in head coordinates, value), later ones over earlier ones."""
        canvas = np.zeros((h, w), np.uint8)
        for shapes, value in painted:
            for shape in shapes:
                cv2.fillPoly(canvas, [place(shape)], value, cv2.LINE_AA, 4)
        return canvas

    def shrink(canvas: np.ndarray) -> np.ndarray:
        """A canvas at the size of the image, float32."""
        return cv2.resize(canvas, (w // k, h // k), interpolation=cv2.INTER_AREA).astype(np.float32, copy=False)

    # --- surface of the brain: the outline, the fissure between the hemispheres, sulci, insula
    hull, curves = _outline_and_curves(p, z, coarse, sulcus)
    surface = np.zeros((h, w), np.uint8)
    cv2.fillPoly(surface, [place(hull * 1.006)], 255, 8, 4)
    lengths = np.cumsum([len(c) for c in curves])[:-1]
    cv2.polylines(surface, np.split(place(np.concatenate(curves)), lengths), False, 0, 1, 8, 4)
    sylvian = np.clip(1.5 - 1.7 * z, 0, 1)  # insula and Sylvian fissure fade upwards
    if sylvian > 0.1:
        thick = max(1, round(scale * sulcus * 1.6 * sylvian))
        for sign in (1, -1):
            middle = np.array([0.5, -0.1])
            sway = np.sin(np.linspace(0, 9, 30) + 6 * p.traits["wiggle"][sign, 0] + z)[:, None] * [0.018, 0.0]
            insula = (_smooth(_INSULA, 30) + sway - middle) * [1, sylvian] + middle
            for curve in (insula, (_smooth(_STEM, 20) + sway[:20, ::-1])[: int(20 * sylvian)]):
                cv2.polylines(surface, [place(curve * [sign, 1])], False, 0, thick, 8, 4)

    # --- fluid and cortex, by the distance to the surface
    distance = cv2.distanceTransform(surface, cv2.DIST_L2, 5)
    distance *= np.float32(1 / scale)
    # Where sulci are wide, the cortex is thin.
    texture = cv2.resize(field[..., 2], (w, h), interpolation=cv2.INTER_CUBIC)
    distance -= texture * np.float32(0.22 * sulcus)
    csf = np.clip((sulcus + 0.005 - distance) * np.float32(1 / 0.010), 0, 1)
    texture *= np.float32(-0.12 * cortical / 0.02)
    texture += (sulcus + cortical + 0.010 - distance) * np.float32(1 / 0.02)
    cortex = np.clip(texture, 0, 1, out=texture)

    # --- deep structures, painted over white matter
    ventricles, caudates, putamina, thalami = _deep_structures(p, z)
    nuclei = cover([(thalami, 30), (putamina, 58), (caudates, 60)])  # how much darker than white matter
    ventricle, brain = cover([(ventricles, 255)]), cover([([hull], 255)])

    # --- grey levels, at the size of the image; white matter dims towards the cortex
    image: np.ndarray = WM - 14 * np.clip(1 - shrink(distance) / 0.16, 0, 1)
    image -= cv2.GaussianBlur(shrink(nuclei), (0, 0), 0.009 * scale / k)
    image += (GM * p.contrast - image) * shrink(cortex)
    image += (CSF - image) * np.maximum(shrink(csf), shrink(ventricle) / 255)

    # --- scanner, and nothing outside the brain
    image = _scan(p, image, size)
    out = np.zeros((size, size), np.uint8)
    inside = shrink(brain) >= 127.5
    out[my : size - my, mx : size - mx] = np.where(inside, np.clip(image, 1, 255), 0).astype(np.uint8)

    # --- true areas, from the shapes on the canvas
    head = brain > 127
    pixels = float(brain.sum()) / 255
    sulci = float(csf[head & (ventricle == 0)].sum())
    grey = float(cortex[head].sum()) - sulci
    area = {"brain_area": pixels / k**2, "ventricle_area": float(ventricle.sum()) / 255 / k**2}
    area["ventricle_fraction"] = area["ventricle_area"] / area["brain_area"]
    return out, area | {"cortex_fraction": grey / pixels, "sulci_fraction": sulci / pixels}


def draw_person(
    seed: int, index: int, slices: int = 8, size: int = 256, levels: Sequence[float] | None = None, **given: Any
) -> tuple[str, np.ndarray, list[dict]]:
    """Draw one synthetic person. It depends on (seed, index) alone, not on who else is drawn.

    Returns the class name, uint8 images [slices, size, size] from the level of the thalamus up to the roof of the
    lateral ventricles, and one row per slice: level in [0, 1], age in years, sex, brain_area and ventricle_area in
    pixels of the image, and ventricle_, cortex_ and sulci_fraction of the brain area, all from the drawn shapes, not
    from grey values. `levels` asks for slices at these levels instead. `given` (group, age, sex) draws the same person
    with other values: all random numbers stay, so the difference is what the value causes.
    """
    if size < 32:
        raise Unusable(f"size is {size}, too small to draw a brain; use 32 or more")
    if slices < 1:
        raise Unusable(f"slices is {slices}, but a person needs at least one")
    if seed < 0:
        raise Unusable(f"seed is {seed}, but it must not be negative")
    person = _Person(seed, index, **given)
    own = np.linspace(0.06, 0.94, slices) if slices > 1 else np.array([0.5])
    images, rows = [], []
    for i, level in enumerate(np.clip(own + person.level, 0, 1) if levels is None else levels):
        image, areas = _draw_slice(person, float(level), size)
        images.append(image)
        rows.append({"slice": i, "level": float(level), "age": person.age, "sex": person.sex} | areas)
    return person.name, np.stack(images), rows


def read_given(words: Sequence[str]) -> dict[str, Any]:
    """["age=85", "group=AD"] -> {"age": 85.0, "group": "AD"}, for draw_person. Unusable says what is wrong."""
    given: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name == "age":
            try:
                given[name] = float(value)
            except ValueError:
                given[name] = float("nan")
            if not AGES[0] <= given[name] <= AGES[1]:
                raise Unusable(f"the age in {word!r} is no number from {AGES[0]:g} to {AGES[1]:g}")
        elif (name, value) in [*(("group", c) for c in CLASSES), *(("sex", s) for s in SEXES)]:
            given[name] = value
        else:
            raise Unusable(f"{word!r} cannot be given; take age=YEARS, sex=F, sex=M, group=AD or group=NC")
    return given


def _draw_files(
    root: Path, split: str, seed: int, index: int, slices: int, size: int, given: dict[str, Any]
) -> list[dict]:
    """Draw one person into root/split/CLASS/ and return the rows of anatomy.csv."""
    import cv2

    name, images, rows = draw_person(seed, index, slices, size, **given)
    subject = f"P{index:04d}"
    for row, image in zip(rows, images):
        row["file"] = f"{split}/{name}/{subject}_{row['slice']:02d}.png"
        # imwrite hides why it failed; bytes written by Python raise (disk full, no permission).
        (root / row["file"]).write_bytes(cv2.imencode(".png", image)[1].tobytes())
    return [{"file": r.pop("file"), "split": split, "class": name, "subject": subject} | r for r in rows]


def make_dataset(
    out: str | Path,
    people: int = 200,
    slices: int = 8,
    size: int = 256,
    seed: int = 0,
    val_fraction: float = 0.15,
    progress: bool = True,
    given: dict[str, Any] | None = None,
) -> Path:
    """Draw OUT/{train,val}/{AD,NC}/P0001_03.png, OUT/anatomy.csv, attributes.csv and OUT/README.txt; return OUT.

    Every person is wholly in train or wholly in val, and both classes are in both (unless the group is `given`, as
    draw_person takes it: then the same people are drawn with these values). OUT appears only when complete.
    """
    out, given = Path(out), given or {}
    if people < 4:
        raise Unusable(f"people is {people}, but both classes need one for train and one for val; use 4 or more")
    if not 0 < val_fraction < 1:
        raise Unusable(f"val_fraction is {val_fraction}, but it must lie between 0 and 1")
    if slices > 100:
        raise Unusable(f"slices is {slices}, but file names have room for 100 per person")
    draw_person(seed, 0, min(slices, 1), size)  # refuses bad numbers before anything is written
    import cv2
    from tqdm import tqdm

    # who goes to val: the same share of each class
    val = set()
    for c in range(len(CLASSES)):
        members = np.random.default_rng([seed, c]).permutation(np.arange(c, people, len(CLASSES)))
        val.update(members[: int(np.clip(round(val_fraction * len(members)), 1, len(members) - 1))].tolist())
    work, threads = None, cv2.getNumThreads()
    try:
        # folders, beside OUT and under another name until all is drawn
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise Unusable(f"{out} exists and is not empty; choose another folder or remove it first")
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        for split in ("train", "val"):
            for name in [given["group"]] if "group" in given else CLASSES:
                (work / split / name).mkdir(parents=True)
        # images, one person per task
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cv2.setNumThreads(1)  # one person per core is faster than one row of pixels per core
        # Threads suffice: numpy and OpenCV release the interpreter lock while they draw.
        with ThreadPoolExecutor(cores) as pool, tqdm(total=people * slices, unit="img", disable=not progress) as bar:
            jobs = [
                pool.submit(_draw_files, work, "val" if i in val else "train", seed, i, slices, size, given)
                for i in range(people)
            ]
            rows = []
            try:
                for job in jobs:
                    rows += job.result()
                    bar.update(slices)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        # true areas, what training can be conditioned on, a note on what this is, and the final name
        texts = [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows]
        named = [{**r, "file": Path(r["file"]).name} for r in texts]
        known = ["file", "level", "age", "sex"]
        for table, columns, lines in (("anatomy.csv", [*rows[0]], texts), ("attributes.csv", known, named)):
            with open(work / table, "w", newline="") as f:
                writer = csv.DictWriter(f, columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(lines)
        (work / "README.txt").write_text(
            "SYNTHETIC phantoms: procedural drawings of axial brain slices; none shows or derives from a patient.\n"
            "AD and NC name two classes of drawings that differ in ventricles, sulci and cortex; they are no medical\n"
            "evidence. True areas of every slice (pixels, fractions of the brain) are in anatomy.csv; level (0: at\n"
            "the thalamus, 1: at the roof of the ventricles), age in years and sex are in attributes.csv, too.\n\n"
            f"Drawn by: phantom.py OUT --people {people} --slices {slices} --size {size} --seed {seed}"
            f" --val-fraction {val_fraction}"
            + " --given" * bool(given)
            + "".join(f" {k}={v:g}" if k == "age" else f" {k}={v}" for k, v in given.items())
            + "\n"
        )
        work.chmod(0o755)  # mkdtemp made it private
        os.replace(work, out)
    except OSError as e:
        raise Unusable(
            f"cannot write {out} ({e.strerror}); make room there, or choose a folder that you may write to"
        ) from e
    finally:
        cv2.setNumThreads(threads)
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    return out


def _measure(out: Path) -> None:
    """Print ventricle fraction per class of the images in a folder, and Cohen's d of the first class and the last."""
    import cv2

    files = []
    for manifest in sorted(out.rglob("manifest.csv")):
        try:
            with open(manifest, newline="", encoding="utf-8") as f:
                rows = list(csv.DictReader(f))
        except (OSError, UnicodeDecodeError, csv.Error) as e:
            raise Unusable(f"cannot read {manifest} ({e}); restore it, or remove it to use folder names") from e
        if rows and not {"file", "class"} <= set(rows[0]):
            raise Unusable(f"{manifest} lacks the columns file and class; add them, or remove it to use folder names")
        files += [(manifest.parent / r["file"], r["class"]) for r in rows]
    files = files or [(path, path.resolve().parent.name) for path in sorted(out.rglob("*.png"))]
    if not files:
        raise Unusable(f"no images to measure in {out}; name a folder that holds png files of brain slices")
    groups: dict[str, list[float]] = {}
    for path, name in files:
        try:
            image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_GRAYSCALE)
        except (OSError, cv2.error):
            image = None
        if image is None:
            raise Unusable(f"cannot read {path} as an image; restore it or take it out of the folder")
        groups.setdefault(name, []).append(float(ventricle_fraction(image[None])[0]))
    print(f"{'class':<12}{'n':>7}   ventricle fraction (mean ± sd)")
    for name, values in sorted(groups.items()):
        print(f"{name:<12}{len(values):>7}   {np.mean(values):.4f} ± {np.std(values, ddof=len(values) > 1):.4f}")
    first, last = min(groups), max(groups)
    if first != last and min(len(groups[first]), len(groups[last])) > 1:
        print(f"Cohen's d ({first} - {last}): {cohens_d(groups[first], groups[last]):.2f}")


def main() -> None:
    """Command line; see the top of the file."""
    import tyro

    def phantom(
        out: tyro.conf.Positional[Path],
        people: int = 200,
        slices: int = 8,
        size: int = 256,
        seed: int = 0,
        val_fraction: float = 0.15,
        given: tuple[str, ...] = (),
        measure: bool = False,
    ) -> None:
        """Draw a data set of synthetic brain slices (no patients), or measure the ventricles of an existing folder.

        Args:
            out: Folder to draw into (must not exist, or be empty), or to measure.
            people: How many people to draw, half of them AD and half NC.
            slices: Slices per person.
            size: Width and height of the images in pixels.
            seed: Same seed, same people.
            val_fraction: Share of each class's people that goes to val.
            given: Draw the same people with other values, e.g. age=85 sex=F group=AD: nothing else about them changes.
            measure: Draw nothing; print the ventricle fraction of the images in the folder, per class.
        """
        if measure:
            _measure(out)
        else:
            make_dataset(out, people, slices, size, seed, val_fraction, given=read_given(given))
            print(f"{people * slices} synthetic slices of {people} people in {out}")

    try:
        tyro.cli(phantom)
    except Unusable as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted before the end; nothing was kept, start again to draw all of it", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
