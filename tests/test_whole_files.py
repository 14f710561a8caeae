"""What is new takes the place of the old whole, and touches nothing else."""

import os

import pytest

from compresso import whole_files


def filled(folder, text):
    folder.mkdir()
    (folder / "x").write_text(text)
    return folder


def test_neighbours_of_a_folder_are_nobodys_leftovers(tmp_path):
    """Copies that a user made by hand, under the names that come to mind."""
    names = ("run.old", "run.partial", "run.bak", "run~")
    for name in names:
        filled(tmp_path / name, name)
    for expected in ("first", "second"):
        with whole_files.new_folder(tmp_path / "run") as new:
            (new / "x").write_text(expected)
        whole_files.heal(tmp_path / "run")
        assert (tmp_path / "run/x").read_text() == expected
    assert {path.name for path in tmp_path.iterdir()} == {"run", *names}
    assert all((tmp_path / name / "x").read_text() == name for name in names)


def test_a_link_to_a_folder_stays_one(tmp_path):
    there = tmp_path / "large disk"
    there.mkdir()
    os.symlink(filled(there / "run", "first"), tmp_path / "run")
    with whole_files.new_folder(tmp_path / "run") as new:
        assert new.parent == there
        (new / "x").write_text("second")
    assert (tmp_path / "run").is_symlink()
    assert (there / "run/x").read_text() == "second"
    assert {path.name for path in there.iterdir()} == {"run"}


def test_a_folder_that_lost_its_name_gets_it_back(tmp_path, monkeypatch):
    filled(tmp_path / "run", "first")
    renamed = type(tmp_path).rename

    def cut_short(path, target):  # the second of two renamings never comes
        if path.name.endswith("partial"):
            raise KeyboardInterrupt
        return renamed(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "rename", cut_short)
        with pytest.raises(KeyboardInterrupt), whole_files.new_folder(tmp_path / "run"):
            pass
    assert not (tmp_path / "run").exists()
    whole_files.heal(tmp_path / "run")
    assert (tmp_path / "run/x").read_text() == "first"
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
