"""Files: names that stay in their folder, contents that are whole."""

import os
import re
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fisher_lab._ground.files import (
    NotOwnFileError,
    UnwrittenError,
    append,
    file_names,
    inside,
    read_own,
    replacing,
    write_atomically,
)


@pytest.mark.parametrize("name", ["errors-frobenius", "a_b", "run.v2", "X"])
def test_a_plain_name_is_its_own(name):
    assert file_names([name]) == [name]


@given(st.lists(st.text(max_size=300)))
def test_names_are_distinct_safe_and_lie_inside(wishes):
    names = file_names(wishes)
    assert len(names) == len(wishes)
    assert len({name.casefold() for name in names}) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,130}", name) for name in names)


@pytest.mark.parametrize(
    "wish",
    ["/etc/passwd", "../up", "..", "a..b", ".", "", ".hidden", "-rf", "a/b", "a\\b", "a\0b", "ü"],
)
def test_what_is_no_plain_name_keeps_what_it_can_and_its_checksum(wish, tmp_path):
    (name,) = file_names([wish])
    assert re.search(r"-[0-9a-f]{8}$", name)
    assert file_names(["other", wish])[1] == name
    assert inside(tmp_path, name).parent == tmp_path


def test_names_that_differ_only_in_case_or_are_the_same_are_counted():
    assert file_names(["a", "A", "a", "a-2"]) == ["a", "A-2", "a-3", "a-2-2"]


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "link/x", "linked"])
def test_a_path_outside_of_the_folder_is_refused(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").mkdir()
    (folder / "link").symlink_to(tmp_path)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="expected one that lies in"):
        inside(folder, name)


@pytest.fixture
def masked():
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_a_file_has_the_permissions_of_any_new_file(tmp_path, masked):
    write_atomically(tmp_path / "deep" / "er" / "x", "ä")
    assert (tmp_path / "deep" / "er" / "x").read_bytes() == "ä".encode()
    assert stat.S_IMODE((tmp_path / "deep" / "er" / "x").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "x"
    path.write_text("old")

    def interrupted():
        with replacing(path) as file:
            file.write(b"half")
            file.flush()
            assert len(list(tmp_path.iterdir())) == 2
            raise error

    # what the system says becomes a sentence
    told = UnwrittenError if error is OSError else error
    with pytest.raises(told):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert path.read_text() == "old"


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "x"
    victim.write_text("precious")
    path.symlink_to(victim)
    write_atomically(path, b"new")
    assert (victim.read_text(), path.read_text(), path.is_symlink()) == ("precious", "new", False)


def test_the_name_while_it_is_written_cannot_be_foreseen_and_fits(tmp_path):
    names = set()
    for _ in range(3):
        with replacing(tmp_path / ("ü" * 120)):
            names |= {p.name for p in tmp_path.iterdir() if p.name.startswith(".")}
    assert len(names) == 3
    assert all(re.search(r"\.[0-9a-f]{16}$", name) for name in names)


def test_a_file_that_is_there_already_is_never_opened(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr("secrets.token_hex", lambda n: "guessed")
    (tmp_path / ".x.guessed").symlink_to(victim)
    with pytest.raises(UnwrittenError, match="File exists"):
        write_atomically(tmp_path / "x", "new")
    assert victim.read_text() == "precious"


def test_text_is_added_at_the_end_of_a_file_but_not_through_a_link(tmp_path, masked):
    path, link = tmp_path / "x", tmp_path / "link"
    append(path, "ä\n")
    append(path, "b\n")
    assert path.read_bytes() == "ä\nb\n".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    link.symlink_to(path)
    with pytest.raises(NotOwnFileError, match="is a link, expected a regular file of your own"):
        append(link, "c\n")
    assert path.read_bytes() == "ä\nb\n".encode()


def test_what_an_interrupted_run_left_is_read_from_ones_own_file_only(tmp_path, monkeypatch):
    path, link = tmp_path / "x", tmp_path / "link"
    assert read_own(path) is None
    path.write_bytes(b"\r\n\0")
    assert read_own(path) == b"\r\n\0"
    link.symlink_to(path)
    for refused, word in ((link, "is a link"), (tmp_path, "is no file")):
        with pytest.raises(NotOwnFileError, match=word):
            read_own(refused)
    monkeypatch.setattr("os.geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(NotOwnFileError, match="belongs to another user"):
        read_own(path)


def test_a_link_is_refused_where_the_system_cannot_be_told_to(tmp_path, monkeypatch):
    monkeypatch.setattr("fisher_lab._ground.files.NO_LINKS", 0)
    (tmp_path / "x").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    with pytest.raises(NotOwnFileError, match="is a link"):
        append(tmp_path / "link", "more")
