"""What is written is whole or not there, and nothing but a regular file is ever replaced."""

import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from agc.files import check_target, replacing, write_text, written


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def pipe(path):
    os.mkfifo(path)


def device_behind_a_link(path):
    path.symlink_to("/dev/null")


def unix_socket(path):
    socket.socket(socket.AF_UNIX).bind(str(path))


def kind(path):
    return stat.S_IFMT(path.lstat().st_mode)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize(
    ("make", "named"),
    [(pipe, "a pipe"), (device_behind_a_link, "a character device"), (unix_socket, "a socket")],
)
def test_what_is_not_a_regular_file_stays(tmp_path, make, named):
    path = tmp_path / "x"
    make(path)
    before = kind(path)
    with pytest.raises(FileExistsError, match=f"{named}, which is never replaced.*x'"):
        write_text(path, "new")
    assert kind(path) == before
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert names(tmp_path) == ["x"]


def test_a_device_stays(tmp_path):
    path = tmp_path / "null"
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        path.symlink_to("/dev/null")  # only root makes devices
    with pytest.raises(FileExistsError, match="a character device"):
        write_text(path, "new")
    assert stat.S_ISCHR(path.stat().st_mode)


@pytest.mark.parametrize("exists", [True, False], ids=["file", "dangling"])
def test_a_link_is_followed_and_stays(tmp_path, exists):
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "file", tmp_path / "link"
    if exists:
        target.write_text("old")
    link.symlink_to("folder/file")
    write_text(link, "new")
    assert link.is_symlink()
    assert not target.is_symlink()
    assert target.read_text() == "new"
    assert written(link) == f"{target}, which {link} links to"
    assert written(target) == str(target)
    assert names(tmp_path) == ["folder", "link"]
    assert names(tmp_path / "folder") == ["file"]


def test_links_in_a_circle(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="a'"):
        write_text(tmp_path / "a", "new")
    assert names(tmp_path) == ["a", "b"]


def test_a_link_into_a_folder_that_is_not_there(tmp_path):
    (tmp_path / "link").symlink_to("nowhere/file")
    with pytest.raises(FileNotFoundError, match="make its folder first"):
        check_target(tmp_path / "link")


def test_permissions_stay(tmp_path):
    path = tmp_path / "secret"
    path.write_text("old")
    path.chmod(0o600)
    write_text(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_appears_while_writing_is_not_replaced(tmp_path):
    path = tmp_path / "x"

    def write():
        with replacing(path) as file:
            file.write(b"new")
            pipe(path)

    with pytest.raises(FileExistsError, match="a pipe"):
        write()
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize(
    ("number", "named"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)]
)
def test_a_full_disk_is_said_of_the_file(tmp_path, number, named):
    path = tmp_path / "x"

    def write():
        with replacing(path):
            raise OSError(number, os.strerror(number))  # as a file's write does

    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        write()
    assert caught.value.filename == (str(path) if named else None)
    assert names(tmp_path) == []


def test_an_interrupted_write_leaves_the_old_file_and_no_trace(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")

    def write():
        with replacing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x"]
