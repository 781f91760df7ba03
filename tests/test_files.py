"""Files are there whole or not at all; what is no file is written to, never replaced."""

import os
import stat
import threading

import pytest

from simct.files import check_file, is_ordinary, replaced, write_json


def write(path, text="new\n"):
    check_file(path)
    with replaced(path) as target:
        target.write(text)


def test_a_link_keeps_leading_where_it_led(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "target").write_text("old")
    (tmp_path / "second").symlink_to("folder/target")
    (tmp_path / "link").symlink_to("second")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "second").is_symlink()
    assert (tmp_path / "folder" / "target").read_text() == "new\n"
    (tmp_path / "loose").symlink_to("folder/not yet")
    write(tmp_path / "loose")
    assert (tmp_path / "folder" / "not yet").read_text() == "new\n" and (tmp_path / "loose").is_symlink()
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "folder",
        "link",
        "loose",
        "not yet",
        "second",
        "target",
    ]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_a_file_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(mode)
    write(path)
    assert path.read_text() == "new\n" and stat.S_IMODE(path.stat().st_mode) == mode


def test_a_new_file_has_the_mode_of_any(tmp_path):
    (tmp_path / "any").write_text("")
    write(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_an_old_file_stays_if_writing_fails(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(TypeError), replaced(tmp_path / "file") as target:
        target.write("half")
        target.write(None)
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_devices_and_streams_are_no_files_to_replace(tmp_path):
    for path in "/dev/null", "/dev/full", "/dev/stdout", "/dev/stderr", "/dev/fd/1", "/proc/self/fd/1":
        assert not is_ordinary(path), path
        check_file(path)
    assert is_ordinary(tmp_path / "new") and is_ordinary(__file__)
    with pytest.raises(ValueError, match="output '/dev/fd/987' cannot be written"):
        check_file("/dev/fd/987")


def test_a_device_behind_a_link_is_written_to(tmp_path):
    for name in "null", "full":
        (tmp_path / name).symlink_to(f"/dev/{name}")
    write(tmp_path / "null")
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "full")
    for name in "null", "full":
        assert (tmp_path / name).is_symlink() and stat.S_ISCHR(os.stat(tmp_path / name).st_mode)


def test_standard_output_goes_on_where_it_stands(tmp_path, capfd):
    """Also where it is a file: a second opening of that would begin at its start."""
    path, link = tmp_path / "all.txt", tmp_path / "out"
    link.symlink_to("/dev/stdout")
    kept = os.dup(1)
    try:
        with path.open("w") as target:
            os.dup2(target.fileno(), 1)
        os.write(1, b"before\n")
        write(link)
        os.write(1, b"after\n")
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert path.read_text() == "before\nnew\nafter\n" and link.is_symlink()


def test_a_pipe_is_written_to(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_json(pipe, {"a": 1}, indent=None)
    reader.join(timeout=60)
    assert read == ['{"a": 1}\n'] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "circle").symlink_to("circle")
    for path, message in (
        (tmp_path, "it is a folder"),
        (tmp_path / "file" / "x", "Not a directory|File exists"),
        (tmp_path / "circle", "symbolic links"),
    ):
        with pytest.raises(ValueError, match=f"cannot be written: .*({message})"):
            check_file(path)
