"""Names of people in files of the usual data sets, and the tables that come with them."""

from __future__ import annotations

from pathlib import Path

import openpyxl
import pytest

from people import Table, known_person, known_session, plain_person, read_rows
from utils import UserError

KNOWN = {
    "002_S_0413/MPR/2006-05-02/I118671/ADNI_002_S_0413_MR_MPR_Br_2006_S13893_I118671": "002_S_0413",
    "disc1/OAS1_0001_MR1/RAW/OAS1_0001_MR1_mpr-1_anon": "OAS1_0001",
    "OAS1_0003_MR2_mpr-4_157": "OAS1_0003",  # Kaggle's slices
    "OAS2_0002_MR3/RAW/mpr-1.nifti": "OAS2_0002",
    "OAS30001_MR_d0129/anat2/sub-OAS30001_ses-d0129_T1w": "OAS30001",
    "OAS42001_MR_d3025/anat/T1w": "OAS42001",
    "IXI002-Guys-0828-T2": "IXI002",
    "ds000001/sub-01/ses-02/anat/sub-01_ses-02_T1w": "sub-01",
    "sub-01_084": "sub-01",
    "john/t1": "",
    "x002_S_0413": "",
}


@pytest.mark.parametrize("path", KNOWN)
def test_people_of_the_usual_data_sets(path: str):
    assert known_person(path) == KNOWN[path]


def test_sessions_of_the_usual_data_sets():
    assert known_session("OAS2_0002_MR3/RAW/mpr-1") == "OAS2_0002_MR3"
    assert known_session("x/OAS30001_MR_d0129/T1w") == "OAS30001_MR_d0129"
    assert known_session("sub-01/ses-02/anat/sub-01_ses-02_T1w").startswith("sub-01") and known_session("john") == ""


@pytest.mark.parametrize(
    ("path", "person"),
    [
        ("john_T1", "john"), ("john_T2", "john"), ("patient7/t1", "patient7"), ("patient7/2019-03-01/t1", "patient7"),
        ("patient7/scan1", "patient7"), ("patient7/scan2", "patient7"), ("bert/mri/orig", "bert"),
        ("AD/12", "AD-12"), ("AD/012", "AD-012"), ("12", "12"), ("t1", ""),
        ("AD/mueller_anna_T1_brain", "mueller_anna"),
        ("AD/subj.003.flair", "subj_003"), ("data/scans/t1", ""),
    ],
)  # fmt: skip
def test_people_by_plain_names(path: str, person: str):
    assert plain_person(path) == person


TABLES = {
    "advanced search": ('"Image Data ID","Subject","Group","Sex","Age"\n"I100001","002_S_0001","CN","M","71"\n', ","),
    "idaSearch": ('"Subject ID","Sex","Research Group","Image ID","Age"\n"002_S_0001","M","CN","100001",71\n', ","),
    "ADNIMERGE": ("RID,PTID,VISCODE,DX,AGE,PTGENDER,IMAGEUID\n1,002_S_0001,bl,CN,71,Male,100001\n", ","),
    "semicolons": ("Image Data ID;Subject;Group;Sex;Age\nI100001;002_S_0001;CN;M;71\n", ";"),
    "tabs": ("Image Data ID\tSubject\tGroup\tSex\tAge\nI100001\t 002_S_0001 \tCN \tM\t71\n", "\t"),
    "empty rows": ("\nImage Data ID,Subject,Group,Sex,Age\n,,,,\nI100001,002_S_0001,CN,M,71\n,,,,\n\n", ","),
}  # fmt: skip
PATH = "002_S_0001/MPR/I100001/x"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("name", TABLES)
def test_tables_of_any_export(tmp_path: Path, name: str, encoding: str):
    (tmp_path / "t.csv").write_bytes(TABLES[name][0].replace("CN", "Köln").encode(encoding))
    table = Table(tmp_path / "t.csv", attributes=["age", "sex"])
    entry = table.look_up(PATH)
    assert (entry.subject, entry.group, entry.attributes) == ("002_S_0001", "Köln", {"age": "71", "sex": "M"})
    assert table.groups == {"Köln"}
    with pytest.raises(LookupError, match="no row for the image I999999"):
        table.look_up("002_S_0001/I999999/x")


def test_spreadsheets(tmp_path: Path):
    book = openpyxl.Workbook()
    for row in (["IXI_ID", "SEX_ID (1=m, 2=f)", "AGE"], [2, 2, 35.8], [12, 1, None], [None, None, None]):
        book.active.append(row)
    book.save(tmp_path / "IXI.xlsx")
    table = Table(tmp_path / "IXI.xlsx", attributes=["sex", "age"])
    assert table.look_up("IXI002-Guys-0828-T1").attributes == {"sex": "F", "age": "35.8"}
    assert table.look_up("IXI012-HH-1211-T1").attributes == {"sex": "M", "age": ""}
    (tmp_path / "torn.xlsx").write_bytes((tmp_path / "IXI.xlsx").read_bytes()[:900])
    with pytest.raises(UserError, match="no table that can be read"):
        read_rows(tmp_path / "torn.xlsx")


def test_sessions_and_people_of_tables(tmp_path: Path):
    """OASIS-1's ID is a session, OASIS-2 has both, a participants.tsv may leave out the sub-."""
    (tmp_path / "1.csv").write_text("ID,M/F,Age,CDR\nOAS1_0001_MR1,F,74,0\nOAS1_0002_MR1,M,55,0.5\n")
    one = Table(tmp_path / "1.csv", "CDR", ["age", "sex"]).look_up("disc1/OAS1_0002_MR1/RAW/OAS1_0002_MR1_mpr-1_anon")
    assert (one.subject, one.group, one.attributes) == ("OAS1_0002", "0.5", {"age": "55", "sex": "M"})
    (tmp_path / "2.csv").write_text(
        "Subject ID,MRI ID,Group,Age\nOAS2_0001,OAS2_0001_MR1,Converted,87\nOAS2_0001,OAS2_0001_MR2,Converted,88\n"
        "OAS2_0002,OAS2_0002_MR1,Nondemented,75\nOAS2_0002,OAS2_0002_MR2,Demented,76\n"
    )  # fmt: skip
    two = Table(tmp_path / "2.csv", attributes=["Age"])
    assert two.look_up("OAS2_0001_MR2/RAW/mpr-1").attributes == {"Age": "88"}
    assert two.look_up("OAS2_0002_MR2/RAW/mpr-1").group == "Demented"
    assert two.look_up("OAS2_0001/x").group == "Converted" and two.look_up("OAS2_0001/x").attributes == {"Age": ""}
    with pytest.raises(LookupError, match="several groups in the table .Nondemented in row 3, Demented in row 4"):
        two.look_up("OAS2_0002/x")
    (tmp_path / "3.tsv").write_text("participant_id\tage\tgroup\n01\t39\tdepr\n02\tn/a\tcontrol\n")
    three = Table(tmp_path / "3.tsv", attributes=["age"])
    assert three.look_up("sub-01/anat/sub-01_T1w").group == "depr"
    assert three.look_up("sub-02/anat/sub-02_T1w").attributes == {"age": ""}
    with pytest.raises(LookupError, match="neither its image number nor its subject"):
        three.look_up("sub-03/anat/sub-03_T1w")


def test_what_is_wrong_with_a_table_is_said(tmp_path: Path):
    def refused(text: str, **how) -> str:
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(UserError) as e:
            Table(tmp_path / "t.csv", **how)
        return str(e.value)

    rows = "Image Data ID,Subject,Group\nI1001,a,CN\nI1001,a,AD\n"
    assert "contradicts itself about image 1001: a CN in row 1" in refused(rows) and "a AD in row 2" in refused(rows)
    assert "no column that says whose row it is" in refused("Name,Group\nx,CN\n")
    assert "no rows below its head" in refused("Subject,Group\n,\n")
    assert "no column shoe size; it has Subject, Group" in refused("Subject,Group\na,CN\n", attributes=["shoe size"])
    assert "no column CDR" in refused("Subject,Group\na,CN\n", group_column="CDR")
    (tmp_path / "t.csv").write_bytes(b"\0\1\2,x\n1,2\n")
    with pytest.raises(UserError, match="no table that can be read"):
        Table(tmp_path / "t.csv")
