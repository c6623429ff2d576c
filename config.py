"""Every setting of every script, as frozen dataclasses, with presets over them. tyro turns them into command lines.

Adding a flag means a field with a docstring here, and its limits in LIMITS. Its default must mean what the code did
without the flag, so that runs that were started before can go on.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, TypeVar

import tyro

Grid = Literal["logsnr", "flow", "nonuniform", "uniform", "full"]
Solver = Literal["dpm++2m", "ddim", "heun"]


# ---------------------------------------------------------------------------------------------------------------------
# What several scripts share: data, machine, steps of a training


@dataclass(frozen=True)
class SourceConfig:
    """Where the data is; shared by every script that reads data."""

    data: str = field(default_factory=lambda: os.environ.get("ADNI_ROOT", "data"))
    """Folder with train/CLASS/*.png (and val/ or test/), or a word: `phantom` draws synthetic slices of 200 people,
    `phantom-1000` of a thousand; `rangpur` is the course's copy of ADNI. Default: the environment variable ADNI_ROOT,
    else `data`."""
    cache: str = "cache"
    """Folder for decoded slices: images are decoded once, not every epoch."""
    seed: int = 0
    """Seed of all random numbers."""


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """How slices are read and split. The weights of a run carry these settings, and scripts that use a run apply them,
    so that people held out from its training stay held out."""

    subject_regex: str = r"^(.*)_"
    """Regular expression that finds the person in a file's name without extension; its first group is the person
    (default: everything up to the last `_`)."""
    val_fraction: float = 0.1
    """Share of each class's people in train/ to set aside for validation, if the data has no val/ folder."""
    skip_bad_files: bool = False
    """Leave out unreadable, empty, all-black or wrongly sized files. Without this flag they stop a run at its start."""


@dataclass(frozen=True)
class MachineConfig:
    """Where a script runs, in which precision, and where it logs."""

    run: str = "adni"
    """Name of the run: its files live in CHECKPOINTS/RUN/. Presets bring their own name."""
    checkpoints: str = "checkpoints"
    """Folder of all runs."""
    device: str = "auto"
    """auto takes CUDA, else the CPU; or name one: cuda, cuda:1, cpu."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the networks; the arithmetic around them is float32. auto: bf16 where the hardware has it, else fp16
    on CUDA, else fp32; and fp32 where images are generated on a CPU."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases. auto: online if logged in, else offline, without pictures that show slices of people. online
    and offline: with those pictures. disabled: nothing is logged there, and wandb need not be installed."""


@dataclass(frozen=True)
class StepsConfig(MachineConfig):
    """What all trainings share."""

    epochs: int = 500
    """Passes over the training set."""
    batch_size: int = 16
    """Images in a step, over all ranks, so that a run is the same on one GPU and on eight."""
    micro_batch: int | Literal["auto"] | None = None
    """Images that go through the network at a time; gradients are added up, so steps are the same in less memory. auto:
    as many as fit the GPU."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 1e-2
    """Decoupled weight decay of AdamW."""
    grad_clip: float = 1.0
    """Largest norm of the gradients; larger ones are scaled down to it. 0 turns clipping off."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average (EMA) of the weights, which is what is evaluated, saved and sampled."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile: a minute at the start for faster steps. auto: on a GPU only."""
    evaluate_every: int = 1
    """Epochs between two evaluations (validation loss, best weights, pictures): more than 1 where an epoch is short."""
    save_minutes: float = 5.0
    """Minutes between two writes of last.pt, which is the most work that a killed job can lose."""
    fresh: bool = False
    """Start over: the old files are moved to RUN/old-DATE, nothing is deleted."""
    dry_run: bool = False
    """Print the plan (data, parameters, steps, memory, folders, and the time, from a few steps on this device) and exit
    without writing anything."""


# ---------------------------------------------------------------------------------------------------------------------
# Trainings


@dataclass(frozen=True)
class PretrainConfig(DataConfig, StepsConfig):
    """Train the VAE that turns slices into latents. Its rules say which people are held out from then on."""

    flip: bool = False
    """Augmentation: mirror half of the slices left to right."""
    image_size: int = 256
    """Side of the square image in pixels; slices are padded to square, then resized."""
    downsample: int = 8
    """Pixels of the image per latent pixel, along each side."""
    latent_channels: int = 8
    """Channels of the latent."""
    channels: tuple[int, ...] = (64, 128, 256)
    """Channels at each resolution level. Each level but the first halves the resolution; a space-to-depth stem does the
    rest of --downsample."""
    blocks: int = 2
    """Residual blocks per level."""
    attention: bool = True
    """Self-attention at the lowest resolution."""
    reconstruction: Literal["l1_ssim", "l1_ms_ssim", "l1_ssim_frequency", "l1", "mse"] = "l1_ssim"
    """Reconstruction loss: L1 with (1 - SSIM), with (1 - MS-SSIM), or with (1 - SSIM) and the focal frequency loss; L1
    alone; or the squared error."""
    adversarial: float = 0.0
    """Weight of a patch discriminator, relative to the gradient of the reconstruction loss. It makes texture sharper
    and costs some PSNR. 0: no discriminator."""
    adversarial_start: float = 0.5
    """Share of the training after which the discriminator begins. The encoder is frozen from then on."""
    kl_weight: float = 3e-4
    """Weight of the KL divergence, which is summed over the latent and divided by the number of image pixels."""
    shift: float = 0.0
    """Augmentation: largest shift along each side, as a share of the image."""
    rotate: float = 0.0
    """Augmentation: largest rotation in degrees."""
    brightness: float = 0.0
    """Augmentation: largest relative change of brightness."""
    schedule: Literal["plateau", "cosine"] = "plateau"
    """Learning-rate schedule. plateau: halved when the validation loss stalls. cosine: 5 % of warm-up, then a cosine to
    zero at the end."""
    plateau_patience: int = 10
    """Epochs without a better validation loss before ReduceLROnPlateau halves the learning rate."""
    gif_every: int = 5
    """Epochs between two frames of the reconstruction GIF."""


@dataclass(frozen=True)
class TrainConfig(SourceConfig, StepsConfig):
    """Train the Fast-DDPM U-Net on the latents of a run's VAE, with the same people held out as there."""

    flip: bool = False
    """Augmentation: mirror half of the slices left to right."""
    augment: int = 0
    """Augmentation: variants of every training slice beside itself, turned, scaled, shifted, bent and with another
    contrast, each a little, as people differ. All are encoded once, at the start."""
    augment_every: int = 0
    """Epochs after which --augment draws other variants. A thread encodes them while the training goes on, from the end
    of the first epoch of the ones before. 0: never."""
    channels: tuple[int, ...] = (128, 256, 512)
    """Channels at each resolution level."""
    blocks: int = 2
    """Residual blocks per level."""
    patch: int = 1
    """Latent pixels along each side that are folded into channels. 2 makes the network four times cheaper."""
    attention: tuple[int, ...] = (16, 8)
    """Side lengths, in patches, at which there is self-attention."""
    dropout: float = 0.0
    """Dropout inside the residual blocks."""
    norm_group: int = 24
    """Fewest channels in a group of GroupNorm. With narrow groups GroupNorm takes a CPU half of a training step."""
    condition: tuple[str, ...] = ("group",)
    """What images are conditioned on: group (the class folder; left out if there is one class only), level (of
    attributes.csv, else the number at the end of a slice's name) and columns of attributes.csv beside train/, such as
    age and sex."""
    unconditional: bool = False
    """Take no conditions at all."""
    class_dropout: float = 0.1
    """Share of images whose conditions are hidden in training, which makes classifier-free guidance possible. Of
    several conditions each is also hidden by itself, in the same share of images, so that each may be unknown."""
    grid: Grid = "logsnr"
    """Timesteps to train on. Images are generated in the same ones, except for full, all 1000, whose weights can be
    sampled in any number of steps (20 by default)."""
    num_steps: int = 10
    """Timesteps in the grid; full ignores it."""
    log_snr: tuple[float, float] | None = None
    """Draw timesteps where log-SNR is about the first number, normally distributed with the second as its deviation;
    0 2 are the logit-normal times of rectified flow. Not given: all timesteps of the grid alike."""
    prediction: Literal["v", "eps", "flow"] = "v"
    """What the network predicts: v, the noise eps as in the Fast-DDPM paper, or the velocity of rectified flow."""
    loss_weight: Literal["uniform", "min_snr"] = "uniform"
    """Weight of a timestep in the loss. uniform: 1. min_snr: Min-SNR with gamma 5, less for the noisiest timesteps."""
    draw_by_weight: bool = False
    """Draw timesteps in proportion to these weights instead of weighting their losses: the mean loss is the same, and
    the gradient varies less from step to step."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises; after that it falls as a cosine."""
    lookahead: bool = False
    """Wrap AdamW in Lookahead (k = 5, alpha = 0.5)."""
    sample_every: int = 10
    """Epochs between two grids of generated images."""


@dataclass(frozen=True)
class TextureConfig(SourceConfig, StepsConfig):
    """Train a network that draws fine detail anew, which decoded latents show too smooth or too rough.

    Any time after pre_train.py: latents, reconstructions and U-Net stay as they are, and every image that is generated
    from then on is drawn with texture, image k always the same.
    """

    epochs: int = 20
    """Passes over the training set."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    channels: tuple[int, ...] = (32, 64, 96, 128)
    """Channels at each resolution level."""
    blocks: int = 1
    """Residual blocks per level."""
    patch: int = 2
    """Pixels along each side that are folded into channels. 2 makes the network four times cheaper."""
    num_steps: int = 10
    """Steps in which texture is drawn, the timesteps that are trained on."""
    noise: float = 1.0
    """Standard deviation of the noise that is put on a decoded image, of values in [-1, 1], and then removed. More
    noise corrects larger faults, and changes more of the image. 1 is for 256x256 pixels, 0.5 for 128x128."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises; after that it falls as a cosine."""


@dataclass(frozen=True)
class DistilConfig(StepsConfig):
    """Teach a network to generate in 1 to 4 steps what a run trained with --grid full generates in many.

    The student has the teacher's VAE, texture and architecture, and starts from the teacher's weights. Every script can
    use the student's run as any other. With --part texture its texture, too, is drawn in fewer steps.
    """

    run: str = "student"
    """Name of the student's run."""
    teacher: str = "pretrained"
    """Run to learn from: CHECKPOINTS/TEACHER/, trained with --grid full; for --part texture, one with a texture."""
    part: Literal["unet", "texture"] = "unet"
    """What to learn from it. texture comes after the U-Net, with the same --run: it is learnt on that run's images."""
    num_steps: int = 4
    """Steps in which the student generates an image; of a texture of ten steps 3 or 1."""
    teacher_steps: int = 16
    """Steps of the teacher's trajectories (DPM-Solver++(2M), equal in log-SNR), a multiple of --num-steps. A texture
    takes its own."""
    trajectories: int = 4096
    """Trajectories to learn from. An epoch visits each of them once."""
    epochs: int = 20
    """Passes over the trajectories."""
    cache: str = "cache"
    """Folder for trajectories that do not fit into memory."""
    seed: int = 0
    """Seed of everything random."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises; after that it falls as a cosine."""


# ---------------------------------------------------------------------------------------------------------------------
# Scripts that look at a trained run


@dataclass(frozen=True)
class PredictConfig(SourceConfig, MachineConfig):
    """Generate new MRIs with a trained run, into a folder that is laid out as training data is."""

    run: str = "pretrained"
    """Run to generate with: CHECKPOINTS/RUN/ with its vae/ and diffusion/."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "disabled"
    """Weights & Biases: whether to show the grid and the denoising GIF there."""
    num_images: int = 16
    """How many images."""
    class_name: tuple[str, ...] = ()
    """Classes to generate, by the names of their folders; they take turns. Default: all."""
    set: tuple[str, ...] = ()
    """What the images are to show, of the attributes that the run was conditioned on: age=75 sex=F level=12. What is
    not set is drawn for each image as it was distributed in training; age=unknown leaves it to the network."""
    sweep: str = ""
    """One image through the values of an attribute, all else held: age=55:90:5, level=-20:40:2, or sex. Writes a
    strip, a GIF and maps of differences instead of --num-images images."""
    seed: int = 0
    """Image k depends on (seed, k) alone, whatever the batch size."""
    out: str = "out"
    """Folder to write to: new or empty, or the same command's own, which is then completed."""
    batch_size: int | None = None
    """Images at a time. Default: 64 on a GPU, 16 elsewhere."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile: a minute at the start for faster steps. auto: on a GPU, for 2,000 images or more."""
    sampling: Literal["fast", "normal"] = "fast"
    """fast: 20 steps of weights that were trained on the full grid, else the weights' own few. normal: all 1000, for
    weights that were trained on the full grid."""
    grid: Grid | None = None
    """Timesteps of fast sampling. Default: logsnr, equal steps of log-SNR, for weights trained on `full`; others can
    take only their own grid."""
    num_steps: int | None = None
    """Number of steps of fast sampling. Default: 20 for weights trained on `full`; others can take only their own
    number."""
    solver: Solver | None = None
    """Sampler: dpm++2m (default of fast sampling), ddim (default of normal sampling; on --grid flow Euler's method for
    rectified flow), or heun, with two network calls a step."""
    eta: float | None = None
    """New noise that dpm++2m or ddim adds at each step: 0 is deterministic, 1 is as much as an SDE's or ancestral
    DDPM's. Default: 1 for normal sampling, and for dpm++2m with weights trained on `full`; else 0."""
    guidance: float = 1.0
    """Classifier-free guidance weight; 1 is none, larger follows the class more."""
    weights: Literal["best", "final"] = "best"
    """Weights with the lowest validation loss, or the last ones."""
    shard: int = 0
    """Generate only every SHARDS-th batch from this one on, as one of several jobs that share one --out."""
    shards: int = 1
    """How many such jobs there are. Together they write the same files as one job."""
    reject_copies: bool = False
    """Generate again every image that is a copy of a training slice, so that the folder holds none. Needs the run's
    --data."""


@dataclass(frozen=True)
class EditConfig(MachineConfig):
    """Show a slice as the run thinks it would look with another age, sex, group ...: no prognosis for anybody.

    The slice is encoded, taken back to the noise that it comes from (DDIM inverted), and generated again from that
    noise with what --set says.
    """

    images: Annotated[str, tyro.conf.arg(metavar="FILE|FOLDER")] = ""
    """A slice, or a folder of slices. attributes.csv there, or up to three folders above, says what is known."""
    set: tuple[str, ...] = ()
    """What is to change: group=AD age=80. All else stays as it is known, or unknown."""
    known: tuple[str, ...] = ()
    """What is known of the slices as they are, where no table says it: age=62 sex=M level=12."""
    run: str = "pretrained"
    """Run to edit with: CHECKPOINTS/RUN/ with its vae/ and diffusion/."""
    wandb: Literal["disabled"] = "disabled"  # type: ignore[assignment]
    """Nothing is logged: the pictures show people."""
    out: str = "edited"
    """Folder to write to: new or empty."""
    num_steps: int = 50
    """Steps up to the noise and down again, equal in log-SNR; weights trained on few timesteps take those instead."""
    guidance: float = 1.0
    """How far to go: 0 is no change, 1 is what is set, more is beyond it."""
    weights: Literal["best", "final"] = "best"
    """Weights with the lowest validation loss, or the last ones."""
    batch_size: int = 16
    """Images at a time."""
    unlike: bool = False
    """Edit images, too, that look like nothing in the training data."""


@dataclass(frozen=True)
class EvaluateConfig(DataConfig, MachineConfig):
    """Evaluate a generator: distances to real slices, anatomy, class fidelity, copies of training slices.

    Writes report.md, report.json and pictures. With --run, the data is split by the run's own settings and seed; the
    flags about splitting and --seed do not change the split.
    """

    run: str | None = None  # type: ignore[assignment]  # unlike other scripts, it can do without a run
    """Run to generate images with; its VAE also measures distances between latents. Default: adni; none with
    --images."""
    images: str | None = None
    """Folder of images to evaluate instead of generating them: predict.py's output, or any other folder, with or
    without a subfolder for each class."""
    num_images: int = 1000
    """How many images to generate; classes are as frequent as in the training data."""
    num_steps: int | None = None
    """Number of steps to generate in. Default, as in predict.py: 20 for weights trained on the full grid, else the
    weights' own number."""
    solver: Solver | None = None
    """Sampler to generate with: dpm++2m, ddim or heun."""
    eta: float | None = None
    """New noise that the sampler adds at each step, from 0 to 1."""
    guidance: float = 1.0
    """Classifier-free guidance weight for generating; 1 is none."""
    weights: Literal["best", "final"] = "best"
    """Weights with the lowest validation loss, or the last ones."""
    batch_size: int = 16
    """Images to generate at a time."""
    held_out: Literal["auto", "val", "test"] = "auto"
    """Held-out people that the generated images are compared with, for the floors. auto: test/ if there is one, because
    the weights were chosen by their loss on val/; else val/."""
    count: int = 2000
    """Most images to use of each set in distances between sets (all sets get the same number)."""
    resamples: int = 200
    """Bootstrap resamples of people for the 95 % intervals."""
    inception_weights: str | None = None
    """File with the weights of FID's InceptionV3 (pt_inception-2015-12-05-6726825d.pth). Adds FID and KID."""
    training_pictures: bool = True
    """Write closest_pairs.png: training slices, which show people, beside the generated images closest to them. Turn it
    off for a report that you want to share."""
    out: str = ""
    """Folder to write to. Default: CHECKPOINTS/RUN/report, or with --images `report`."""


@dataclass(frozen=True)
class TsneConfig(SourceConfig, MachineConfig):
    """Map latents by t-SNE, generated ones over real ones, and measure how well the classes separate."""

    generated: str | None = None
    """Folder written by predict.py. Without it, 128 latents are generated with the run's U-Net, if it has one."""
    max_slices: int = 4000
    """Real slices on the map; if there are more, they are chosen at random."""
    perplexity: float = 30.0
    """Perplexity of t-SNE."""
    colour: str = "group"
    """What the points are coloured by: group, level or a column of attributes.csv, such as age."""
    out: str = ""
    """Folder to write to. Default: CHECKPOINTS/RUN/tsne."""


@dataclass(frozen=True)
class AppConfig:
    """A page to generate slices on, watch how they come about, and walk between seeds and classes.

    Open http://HOST:PORT in a browser. The page works offline and sends nothing anywhere.
    """

    run: tuple[str, ...] = ("pretrained", "pretrained/phantoms")
    """Runs to choose from: CHECKPOINTS/RUN/ with its vae/ and diffusion/."""
    checkpoints: str = "checkpoints"
    """Folder of all runs."""
    data: str = ""
    """The data the runs were trained on: then each image is shown beside the nearest training slice, which is of a
    person. Runs trained on phantoms need no folder."""
    cache: str = "cache"
    """Folder for decoded slices."""
    weights: Literal["best", "final"] = "best"
    """Weights with the lowest validation loss, or the last ones."""
    device: str = "auto"
    """auto takes CUDA, else the CPU; or name one: cuda, cuda:1, cpu."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the networks. auto: half on a GPU, float32 elsewhere."""
    host: str = "127.0.0.1"
    """Address to listen on. The default can be reached from this machine only, 0.0.0.0 from everywhere."""
    port: int = 7860
    """Port to listen on."""
    max_images: int = 16
    """Most images that a visitor can ask for at once."""
    max_steps: int = 50
    """Most steps that a visitor can ask for."""
    queue: int = 20
    """Most requests that may wait; they are served one after the other."""


@dataclass(frozen=True)
class ReportConfig:
    """Write RUN/report.html, one page about a run: curves, pictures over the epochs, evidence, configuration."""

    run: str = "adni"
    """Name of the run."""
    checkpoints: str = "checkpoints"
    """Folder of all runs."""
    training_pictures: bool = True
    """Show slices of the data, which show people. Turn it off for a page that you want to share."""
    out: str = ""
    """File to write. Default: CHECKPOINTS/RUN/report.html, or report-without-people.html."""


# ---------------------------------------------------------------------------------------------------------------------
# The two commands of dataset.py


@dataclass(frozen=True)
class CheckConfig:
    """Report what is in a data folder, and whether it can be trained on (exit code 2 if not).

    Prints counts, sizes, bad files, people in more than one split, and held-out slices that look like a training slice.
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """The data folder, or `phantom` or `rangpur`, as for --data in training."""
    cache: str = "cache"
    """Folder for decoded slices."""
    subject_regex: str = DataConfig.subject_regex
    """Regular expression that finds the person in a file's name, as in training."""
    near_identical: float = 0.96
    """Two slices count as look-alikes if the correlation of their thumbnails is above this."""


@dataclass(frozen=True)
class SliceConfig:
    """Cut volumes into slices, in the folder layout for training.

    Reads NIfTI, Analyze, MGZ, NRRD, MetaImage and DICOM, whatever the files are called. Slices have square pixels,
    front or top upwards, and the patient's right on the left side. OUT/volumes.csv lists every volume: how many slices,
    of which patient and class, or why it was left out; OUT/slices.html shows one slice of each. After an interruption,
    or when volumes were added, repeat the command: it does what is left.
    """

    volumes: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="VOLUMES")]
    """Folder with volumes, at any depth."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder to write to, as OUT/SPLIT/CLASS/SCAN_SLICE.png: a new one, or one that this command wrote before."""
    match: tuple[str, ...] = ()
    """Take only volumes whose path below VOLUMES, or one part of it, fits one of these patterns, e.g. "*_T1w*"."""
    skip: tuple[str, ...] = ()
    """Leave out volumes whose path, or one part of it, fits one of these patterns, e.g. derivatives."""
    table: str = ""
    """Table of groups and people: an export of LONI, ADNIMERGE, a BIDS participants.tsv, a spreadsheet of OASIS or IXI,
    or your own, with a column for the scan (Image Data ID) or the person (Subject). It gives classes and patients."""
    group_column: str = ""
    """Column of the table that holds the class. Default: Group, Research Group, DX or the like."""
    groups: tuple[str, ...] = ()
    """Groups of the table to keep, e.g. AD CN. Default: all."""
    attributes: tuple[str, ...] = ()
    """Further columns of the table to keep, e.g. age sex education: they go into OUT/attributes.csv."""
    class_name: str = "all"
    """Class of all volumes, if there is no table, or none with groups."""
    split: Literal["train", "val", "test"] = "train"
    """Split to write to. If there is no val/, training sets people of train/ aside for validation."""
    prepare: Literal["none", "all"] = "none"
    """all: --strip, --bias and --register affine, which is right for raw heads."""
    strip: bool = False
    """Remove the skull (deepbet). A brain that has none is left as it is."""
    bias: bool = False
    """Even out the brightness within the brain (N4)."""
    register: Literal["off", "rigid", "affine"] = "off"
    """Align the brain with the MNI152 template, so that a level shows the same anatomy in everybody. rigid keeps sizes,
    affine changes them, too."""
    plane: Literal["axial", "coronal", "sagittal"] = "axial"
    """Plane of the slices. Sagittal slices and coronal ones near the front show the face, unless it was removed."""
    range: tuple[float, float] | None = None
    """Positions of the first and the last slice in mm. Axial: distance below the top of the head (default 44 75, for
    brains with the skull removed; with a skull add about 12). Coronal: in front of the middle of the head; sagittal: to
    the right of it (default -16 15). With --register: coordinates of MNI152 (default: axial 5 36, coronal -34 -3)."""
    spacing: float = 1.0
    """Distance between slices in mm."""
    frame: float | None = None
    """Side of a slice in mm, around the head: all slices have the same scale. Default: 240, or 200 with --strip."""
    pixel_size: float | None = None
    """Side of a pixel in mm. Default: such that a slice has 256 x 256 pixels."""
    window: tuple[float, float] = (0.5, 99.5)
    """Percentiles of the brain's intensities that become black and white."""
    cache: str = "cache"
    """Folder for what --strip, --bias and --register found out, by the content of each volume."""
    device: str = "auto"
    """Where --strip runs: auto takes CUDA, else the CPU; or name one: cuda, cuda:1, cpu."""
    workers: int = 0
    """Volumes to work on at the same time. 0: one per core, at most 8."""


# ---------------------------------------------------------------------------------------------------------------------
# Presets and limits

# What a preset does not name is what the defaults above are.
PRESETS: dict[str, dict[type, dict]] = {
    # 256²: one GPU. What paid in the studies of docs/results.md: cosine and discriminator for the VAE; v on all
    # timesteps, drawn by their Min-SNR weight, for the U-Net. Batch 64 takes 4 GB in half precision. With this decay
    # the average spans a tenth of the steps so far (EMA in loop.py), which is within what EDM2 (arXiv:2312.02696,
    # section 3) found best.
    "adni": {
        PretrainConfig: dict(epochs=60, lr=6e-4, kl_weight=1e-3, schedule="cosine", adversarial=0.2, flip=True),
        TrainConfig: dict(
            batch_size=64, lr=3e-4, grid="full", loss_weight="min_snr", draw_by_weight=True, ema_decay=0.9999
        ),
    },
    # The recipe of the first version, to compare with: squared error and KL divergence, the noise as what is predicted,
    # the ten timesteps that Fast-DDPM published, and DDIM. Its weight of the KL divergence is not known: ours is taken.
    "origin": {
        PretrainConfig: dict(
            run="origin", reconstruction="mse", schedule="plateau", adversarial=0.0, epochs=500, batch_size=16, lr=1e-4,
        ),
        TrainConfig: dict(
            run="origin", grid="nonuniform", num_steps=10, prediction="eps", loss_weight="uniform", epochs=500,
            batch_size=16, lr=1e-4, warmup=0.1,
        ),
        PredictConfig: dict(run="origin", solver="ddim"),
        EvaluateConfig: dict(run="origin", solver="ddim"),
    },
    "small": {  # 128²: one modest GPU, or a patient CPU
        PretrainConfig: dict(
            run="small", image_size=128, channels=(48, 96, 160), blocks=1, epochs=10, batch_size=8, lr=6e-4,
            kl_weight=1e-3, schedule="cosine", adversarial=0.2, flip=True,
        ),
        TrainConfig: dict(
            run="small", channels=(128, 256), blocks=1, attention=(8,), grid="full", epochs=60, lr=7e-4,
            loss_weight="min_snr", draw_by_weight=True, ema_decay=0.999, sample_every=5,
        ),
        TextureConfig: dict(run="small", epochs=13, batch_size=8, ema_decay=0.998, noise=0.5),
    },
    # Phantoms at 64²: a CPU, minutes. Latents of 8x8 cells, because that is all a U-Net can learn to fill so soon.
    "demo": {
        PretrainConfig: dict(
            run="demo", data="phantom", image_size=64, latent_channels=8, channels=(48, 96), blocks=1, attention=False,
            epochs=6, batch_size=8, lr=2e-3, kl_weight=1e-3, schedule="cosine", ema_decay=0.99, gif_every=1,
            wandb="disabled", precision="fp32",
        ),
        TrainConfig: dict(
            run="demo", data="phantom", channels=(96, 128), attention=(8,), blocks=1, grid="full", epochs=12,
            batch_size=8, lr=2e-3, loss_weight="min_snr", ema_decay=0.998, wandb="disabled", sample_every=4,
            precision="fp32",
        ),
        TextureConfig: dict(
            run="demo", data="phantom", channels=(16, 32), epochs=2, batch_size=8, lr=2e-3, ema_decay=0.99,
            num_steps=8, noise=0.25, wandb="disabled", precision="fp32",
        ),
        PredictConfig: dict(run="demo", data="phantom"),
        EvaluateConfig: dict(run="demo", data="phantom", wandb="disabled"),
        TsneConfig: dict(run="demo", data="phantom", wandb="disabled"),
    },
}  # fmt: skip

Config = TypeVar("Config")

# The range of each number. A flag or a file's header outside of it is refused before anything else happens.
LIMITS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**62), "epochs": (1, 10**9), "batch_size": (1, 10**6), "num_images": (1, 10**9),
    "image_size": (8, 4096), "latent_channels": (1, 1024), "blocks": (1, 64), "num_steps": (1, 1000),
    # For these classes only: a student may take a single step.
    "TrainConfig.num_steps": (2, 1000), "TextureConfig.num_steps": (2, 100),
    "lr": (1e-12, 10), "weight_decay": (0, 10), "grad_clip": (0, 1e9), "ema_decay": (0, 1), "kl_weight": (0, 1e6),
    "val_fraction": (0, 0.9), "dropout": (0, 0.9), "class_dropout": (0, 1), "warmup": (0, 1), "eta": (0, 1),
    "TextureConfig.noise": (0.25, 2),
    "shift": (0, 0.5), "rotate": (0, 180), "brightness": (0, 1), "sample_every": (1, 10**9), "gif_every": (1, 10**9),
    "adversarial": (0, 100), "adversarial_start": (0, 1), "augment": (0, 1000), "augment_every": (0, 10**9),
    "evaluate_every": (1, 10**9),
    "norm_group": (1, 10**4), "patch": (1, 64), "micro_batch": (1, 10**6), "shards": (1, 10**6), "shard": (0, 10**6),
    "channels": (1, 2**14), "downsample": (1, 1024), "attention": (0, 4096), "in_channels": (1, 1024),
    "resolution": (1, 4096), "conditions": (0, 10**5), "num_train_timesteps": (2, 10**4), "beta_start": (1e-9, 0.5),
    "beta_end": (1e-9, 0.5),
    "teacher_steps": (1, 999), "trajectories": (16, 10**8), "perplexity": (1, 10**6), "max_slices": (10, 10**9),
    "count": (10, 10**6), "resamples": (10, 10**5),
    "range": (-1000, 1000), "spacing": (0.01, 100), "frame": (20, 1000), "pixel_size": (0.05, 20), "window": (0, 100),
    "workers": (0, 256),
    "port": (1, 65535), "max_images": (1, 256), "max_steps": (2, 1000), "queue": (1, 10**4),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Command lines, and settings that files hold


def parse(config: type[Config], argv: list[str] | None = None) -> Config:
    """Read a command line: an optional name of a preset first, then flags that override it.

    On an unknown preset or flag, or a value outside LIMITS, prints one sentence and exits with 2.
    """
    # The first word is a preset, unless it is a flag.
    typed = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    named = bool(argv) and not argv[0].startswith("-")
    preset = argv.pop(0) if named else "adni"
    if preset not in PRESETS:
        print(f"error: there is no preset '{preset}': take {', '.join(PRESETS)}, then flags", file=sys.stderr)
        raise SystemExit(2)
    # A preset that is named also names the run, for scripts whose other settings it leaves alone, too.
    names: dict[type, dict[str, Any]] = {AppConfig: {"run": (preset,)}, DistilConfig: {"teacher": preset}}
    own = names.get(config, {"run": preset}) if named else {}
    plain: Any = config()
    default = replace(plain, **{**own, **PRESETS[preset].get(config, {})})
    # tyro knows the flags; the presets are ours, and so --help has to name them.
    name = os.path.basename(sys.argv[0]) or "script"
    about = inspect.cleandoc(config.__doc__ or "")
    about += f"\n\nusage: python {name} [{'|'.join(PRESETS)}] [--flag value ...]   (no preset: adni)"
    return read_flags(config, argv, typed, default=default, prog=f"python {name} {preset}", description=about)


def read_flags(config: type[Config], argv: list[str], typed: bool, **how: Any) -> Config:
    """Let tyro read flags, and check their numbers.

    If they were `typed`, `--help | head` ends quietly, and Ctrl-C ends the script at once while it imports torch, until
    `run_script` takes over.
    """
    if typed:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    cfg = within_limits(tyro.cli(config, args=argv, **how))
    if typed:
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    return cfg


def within_limits(cfg: Config) -> Config:
    """Return the config if every number is within LIMITS; else print one sentence and exit with 2."""
    # A limit for one class, "TrainConfig.num_steps", comes before the limit of the name.
    for key, value in vars(cfg).items():
        own = f"{type(cfg).__name__}.{key}"
        if wrong := outside_limits(own if own in LIMITS else key, value):
            print(f"error: --{key.replace('_', '-')} {wrong}", file=sys.stderr)
            raise SystemExit(2)
    return cfg


def outside_limits(key: str, value: Any) -> str:
    """Say which number of this setting (a number or several) is outside LIMITS; empty if none is."""
    low, high = LIMITS.get(key, (float("-inf"), float("inf")))
    numbers = value if isinstance(value, (tuple, list)) else [value]
    wrong = [n for n in numbers if isinstance(n, (int, float)) and not low <= n <= high]  # NaN is wrong too
    return f"{wrong[0]:g} is not between {low:g} and {high:g}" if wrong else ""


# The types that settings in a file may have, by their annotation.
KINDS: dict[str, Any] = {"bool": bool, "int": int, "float": (int, float), "str": str, "Sequence[int]": list}


def check_arguments(make: Callable, given: object) -> dict[str, Any]:
    """Return `given`, arguments read from a file, if make(**given) may be called; else ValueError says why not.

    The names must be known, the types those of the annotations, and the numbers within LIMITS, because a file may come
    from anywhere.
    """
    # Each setting by itself, then whether one is missing.
    if not isinstance(given, dict):
        raise ValueError("settings are missing")
    known = inspect.signature(make).parameters
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{name[:40]!r} is no setting of this version")
        kind = known[name].annotation
        fits = isinstance(value, KINDS[kind]) and (kind == "bool" or not isinstance(value, bool))
        if kind == "Sequence[int]" and fits:
            fits = all(type(v) is int for v in value) and (value != [] or name != "channels")
        if not fits:
            raise ValueError(f"{name} is {repr(value)[:40]}, which is not of type {kind}")
        if wrong := outside_limits(name, value):
            raise ValueError(f"{name} {wrong}")
    if missing := [p.name for p in known.values() if p.default is p.empty and p.name not in given]:
        raise ValueError(f"{missing[0]} is missing")
    return given


def parse_dataset(argv: list[str] | None = None) -> CheckConfig | SliceConfig:
    """Read the command line of `python dataset.py check DIR` or `python dataset.py slice VOLUMES OUT`."""
    typed = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    kinds = {"check": CheckConfig, "slice": SliceConfig}
    if argv[:1] and argv[0] in kinds:
        kind, prog = kinds[argv[0]], f"python dataset.py {argv[0]}"
        about = inspect.cleandoc(kind.__doc__ or "")
        cfg: Any = read_flags(kind, argv[1:], typed, prog=prog, description=about)
        return cfg
    print(
        "usage: python dataset.py check DIR          looks a data folder over\n"
        "       python dataset.py slice VOLUMES OUT  cuts volumes (NIfTI, DICOM, MGZ ...) into slices\n"
        "(check --help and slice --help say more)"
    )
    raise SystemExit(0 if argv[:1] in (["--help"], ["-h"]) else 2)
