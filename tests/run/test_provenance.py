"""Where numbers come from: hardware, versions, and the commit of the checkout."""

import subprocess

from spiral_jax.run import provenance


def test_a_start_names_hardware_and_versions():
    row = provenance.describe()
    assert row["versions"]["python"].startswith("3.")
    assert {"jax", "flax", "numpy"} <= row["versions"].keys()
    assert "cpu" in row["devices"] and row["processes"] == 1
    assert row["time"].endswith("+00:00")


def checkout(folder, monkeypatch):
    """A git repository whose file `program.py` is the program, committed."""

    def git(*arguments):
        identity = ("-c", "user.name=n", "-c", "user.email=e")
        command = ("git", "-C", str(folder), *identity, *arguments)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (folder / "docs").mkdir()
    for name in ("program.py", "docs/numbers.md"):
        (folder / name).write_text("")
    git("add", "-A")
    git("commit", "-qm", "first")
    monkeypatch.setattr(provenance, "__file__", str(folder / "program.py"))
    return git("rev-parse", "HEAD")


def test_the_commit_is_that_of_the_program_and_docs_do_not_modify_it(tmp_path, monkeypatch):
    head = checkout(tmp_path, monkeypatch)
    assert provenance.commit() == (head, False)
    (tmp_path / "docs/numbers.md").write_text("measured")
    (tmp_path / "notes.txt").write_text("not tracked")
    assert provenance.commit() == (head, False)
    (tmp_path / "program.py").write_text("changed")
    assert provenance.commit() == (head, True)


def test_an_installation_inside_another_repository_has_no_commit(tmp_path, monkeypatch):
    checkout(tmp_path, monkeypatch)
    (tmp_path / "installed.py").write_text("")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "installed.py"))
    assert provenance.commit() == (None, None)
    monkeypatch.setattr(provenance, "__file__", "/")
    assert provenance.commit() == (None, None)
