"""Whose scan it is, and what is known about them: names of files and folders of the usual data sets, and tables.

A table may be either export of LONI, ADNIMERGE, a BIDS participants.tsv, a spreadsheet of OASIS or IXI, or one's own.
"""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Names

# Names of people in the usual data sets: the person is the first group, the session the whole match.
KNOWN = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(\d{3}_S_\d{4,5})"  # ADNI, of any file of it
    r"|(OAS[12]_\d{4})(?:_MR\d+)?"  # OASIS-1 and -2, and Kaggle's slices of OASIS-1
    r"|(OAS[34]\d{4})(?:_MR_d\d+)?"  # OASIS-3 and -4
    r"|(IXI\d{3})(?:-[A-Za-z]+-\d+)?"  # IXI
    r"|(sub-(?!OAS|IXI)[A-Za-z0-9]+)(?:[_/]ses-[A-Za-z0-9]+)?"  # BIDS
    r")(?![A-Za-z0-9])"
)

# Words that say what kind of image it is, or which visit, and not who: of them no name of a person is made.
NOT_A_NAME = re.compile(
    r"(?:t1|t2|pd|flair|swi|dwi|mra|mprage|mp2rage|spgr|fspgr|bravo|tfe|t1w|t2w|t1wi?ce?|anat|anatomical|structural|"
    r"mri?|brain|head|skull|image|img|scans?|volumes?|orig|raw|nifti|nii|dicom|dcm|converted|processed|data|ses|"
    r"session|visit|baseline|bl|followup|follow|up|sc|screening|tp|time|point|run|acq|series|rep|mpr|axial|ax|"
    r"coronal|cor|sagittal|sag|tra|stripped|bet|masked|bias|corrected|reg|registered|mni|m\d+|y\d+|v\d+|r\d+|"
    r"(?:ses|run|visit|scan|mpr|mr|tp|series|session|t1|t2)-?\d+|\d{1,2}|\d{4}[-_.]?\d{2}[-_.]?\d{2}.*)",
    re.IGNORECASE,
)
IMAGE_NUMBER = re.compile(r"(?<![A-Za-z0-9])I(\d{3,})(?![A-Za-z0-9])")  # LONI's, in paths of ADNI


def known_person(path: str) -> str:
    """The person in a path or a file's name of one of the usual data sets; "" if there is none."""
    found = [m for m in KNOWN.finditer(path)]
    return next(group for group in found[-1].groups() if group) if found else ""


def known_session(path: str) -> str:
    """Person and visit, as these data sets write them, e.g. OAS2_0001_MR2; "" if there is none."""
    found = [m for m in KNOWN.finditer(path)]
    return max((m[0] for m in found), key=len) if found else ""


def plain_person(path: str) -> str:
    """The person in a path that follows no convention, without ending; "" if every part is a word like T1 or scan1.

    john_T1 and john_T2 are john, patient7/t1 and patient7/2019-03-01/t1 are patient7, as is FreeSurfer's
    patient7/mri/orig. Where a file's name is a number, the folder belongs to it: AD/12 is AD-12.
    """
    parts = path.split("/")
    for i in reversed(range(len(parts))):
        words = re.split(r"[_. ]+", parts[i])
        if re.fullmatch(r"\d+", parts[i]):
            return "-".join(parts[max(0, i - 1) : i + 1])
        while words and NOT_A_NAME.fullmatch(words[-1]):
            words.pop()
        if words:
            return "_".join(words)
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a table as {column: text without blanks around it}: CSV with any separator and encoding, TSV, or XLSX.

    Empty rows are left out; n/a and the like are "". UserError if it is no table.
    """
    try:
        data = path.read_bytes()
        if data.startswith(b"PK"):
            lines = read_spreadsheet(data)
        else:
            text = decode(data)
            head = text.split("\n", 1)[0]
            separator = max(",;\t|", key=head.count)
            lines = [*csv.reader(io.StringIO(text, newline=""), delimiter=separator)]
    except (csv.Error, UnicodeDecodeError, ValueError) as e:
        raise UserError(f"{path} is no table that can be read ({e}): save it as CSV in UTF-8") from None
    cells = [[cell.strip() for cell in line] for line in lines]
    cells = [["" if c.lower() in ("n/a", "na", "nan", "null") else c for c in line] for line in cells]
    cells = [line for line in cells if any(line)]
    if len(cells) < 2:
        raise UserError(f"{path} holds no rows below its head: name a table with a row for each scan or person")
    head_row = cells[0]
    return [dict(zip(head_row, line + [""] * len(head_row))) for line in cells[1:]]


def decode(data: bytes) -> str:
    """Text in UTF-8, UTF-16 (with its mark), or what Windows in Western Europe writes."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252")
    if "\0" in text:
        raise ValueError("it holds bytes that are not text")
    return text


def read_spreadsheet(data: bytes) -> list[list[str]]:
    """The cells of the first sheet of an XLSX file."""
    import openpyxl

    try:
        sheet = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True).worksheets[0]
        return [["" if c is None else f"{c:g}" if isinstance(c, float) else str(c) for c in row]
                for row in sheet.iter_rows(values_only=True)]  # fmt: skip
    except Exception as e:  # a damaged archive can make its reader fail in any way
        raise ValueError(f"{type(e).__name__}: {e}") from None


def plain(name: str) -> str:
    """A column's name without case, blanks, and what stands in brackets: "SEX_ID (1=m, 2=f)" is sexid."""
    return re.sub(r"[^a-z0-9/]+", "", re.sub(r"\(.*?\)", "", name).lower())


# What the usual tables call their columns, in plain(): the first that a table has is taken.
COLUMNS: dict[str, tuple[str, ...]] = {
    "image": ("imagedataid", "imageid", "imageuid", "imagedatauid"),
    "session": ("mriid", "mrid", "sessionlabel", "oasissessionlabel", "session"),
    "subject": ("subject", "subjectid", "ptid", "participantid", "patient", "patientid", "oasisid", "ixiid", "id"),
    "group": ("group", "researchgroup", "dx", "diagnosis", "dxbl", "class", "label"),
    "age": ("age", "ageatvisit", "ageatscan", "ageatentry", "ages"),
    "sex": ("sex", "gender", "ptgender", "m/f", "sexid"),
    "education": ("education", "educ", "pteducat", "educationyears", "qualificationid"),
}
SEX = {"m": "M", "male": "M", "man": "M", "f": "F", "female": "F", "woman": "F", "w": "F"}


def find_column(head: Sequence[str], wanted: str) -> str:
    """The name of this column in a table: as it is written, by what `COLUMNS` knows, or without case; "" if none."""
    if wanted in head:
        return wanted
    for name in COLUMNS.get(plain(wanted), (plain(wanted),)):
        for column in head:
            if plain(column) == name:
                return column
    return ""


@dataclass(frozen=True)
class Entry:
    """What a table says of one scan, or of one person."""

    line: int  # below the head, counted from 1
    image: str  # the number of an image without its I; "" if the table has none
    session: str
    subject: str
    group: str
    attributes: Mapping[str, str] = field(default_factory=dict)


class Table:
    """Finds what a table says about a scan: by its image number, else by its session, else by its person.

    `groups` are all groups in it. UserError if it has none of the columns that this needs, lacks one of `attributes`,
    or if two rows for one image contradict each other.
    """

    def __init__(self, path: Path, group_column: str = "", attributes: Sequence[str] = ()):
        self.path, rows = path, read_rows(path)
        head = [*rows[0]]
        column = {kind: find_column(head, kind) for kind in ("image", "session", "subject", "group")}
        if group_column:
            column["group"] = find_column(head, group_column)
        if not (column["image"] or column["session"] or column["subject"]):
            raise UserError(
                f"{path} has no column that says whose row it is, such as Subject or Image Data ID; it has "
                f"{', '.join(head)[:100]}"
            )
        if group_column and not column["group"]:
            raise UserError(f"{path} has no column {group_column}; it has {', '.join(head)[:100]}")
        self.has_groups = bool(column["group"])
        named = {name: find_column(head, name) for name in attributes}
        if missing := [name for name, found in named.items() if not found]:
            raise UserError(f"--attributes: {path} has no column {missing[0]}; it has {', '.join(head)[:100]}")

        # The rows, by each of the names that a path may hold
        self.by_image: dict[str, Entry] = {}
        self.by_name: dict[str, list[Entry]] = defaultdict(list)
        self.groups: set[str] = set()
        for line, row in enumerate(rows, 1):
            cell = {kind: row.get(name, "") if name else "" for kind, name in column.items()}
            subject = subject_as_in_paths(cell["subject"], column["subject"])
            entry = Entry(
                line, cell["image"].lstrip("I"), cell["session"], known_person(subject) or subject, cell["group"],
                {name: attribute(name, row.get(found, ""), found) for name, found in named.items()},
            )  # fmt: skip
            self.groups |= {entry.group} - {""}
            if entry.image:
                before = self.by_image.setdefault(entry.image, entry)
                if (before.subject, before.group) != (entry.subject, entry.group):
                    raise UserError(
                        f"{path} contradicts itself about image {entry.image}: {before.subject} {before.group} in row "
                        f"{before.line:,} below the head, {entry.subject} {entry.group} in row {line:,}"
                    )
            # The ID of OASIS-1 is a session, OAS1_0001_MR1: it is a name, and so is the person in it.
            for name in {entry.session, subject, entry.subject} - {""}:
                self.by_name[name].append(entry)
        names = "|".join(re.escape(name) for name in sorted(self.by_name, key=len, reverse=True))
        self.any_name = re.compile(rf"(?<![A-Za-z0-9])({names})(?![A-Za-z0-9])") if names else None

    def look_up(self, path: str) -> Entry:
        """The entry of the scan at this path, without its ending. LookupError says why there is none."""
        # An image number decides, if the table has any.
        image = IMAGE_NUMBER.findall(path)
        if image and self.by_image:
            if image[-1] not in self.by_image:
                raise LookupError(f"the table has no row for the image I{image[-1]}")
            return self.by_image[image[-1]]
        # Then session and person: a whole folder or file name decides, else names inside of names are looked for.
        for name in (known_session(path), known_person(path)):
            if name in self.by_name:
                return self._one(name, self.by_name[name])
        found = {part for part in path.split("/") if part in self.by_name}
        found = found or set(self.any_name.findall(path) if self.any_name else [])
        if not found:
            raise LookupError("the table has no row for it: neither its image number nor its subject is in its path")
        if len(found) > 1:
            raise LookupError(f"its path names several subjects of the table: {', '.join(sorted(found))[:100]}")
        (name,) = found
        return self._one(name, self.by_name[name])

    def _one(self, name: str, entries: list[Entry]) -> Entry:
        """One entry out of those for a name. What they disagree about is not known, but for the group."""
        groups = {e.group for e in entries if e.group}
        if len(groups) > 1:  # the diagnosis changed between visits
            shown = ", ".join(f"{e.group} in row {e.line:,}" for e in entries[:4])
            raise LookupError(f"{name} has several groups in the table ({shown}), and nothing in its path says which")
        first = next((e for e in entries if e.group), entries[0])
        agreed = {}
        for key in first.attributes:
            values = {e.attributes[key] for e in entries} - {""}
            agreed[key] = values.pop() if len(values) == 1 else ""
        return Entry(first.line, "", "", first.subject or name, first.group, agreed)


def subject_as_in_paths(subject: str, column: str) -> str:
    """IXI's table has 2 where its files have IXI002, and a participants.tsv may have 01 for sub-01."""
    if plain(column) == "ixiid" and subject.isdigit():
        return f"IXI{int(subject):03d}"
    bids = plain(column) == "participantid" and subject and not subject.startswith("sub-")
    return f"sub-{subject}" if bids else subject


def attribute(name: str, value: str, column: str) -> str:
    """A cell as it goes into attributes.csv: sexes as M and F, also where the column says which number is which."""
    if plain(name) != "sex":
        return value
    coded = dict(re.findall(r"(\d)\s*=\s*(\w+)", column))  # as in IXI's "SEX_ID (1=m, 2=f)"
    value = coded.get(value, value)
    return SEX.get(value.lower(), value)
