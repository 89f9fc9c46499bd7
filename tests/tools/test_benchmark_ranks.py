"""How a benchmark starts its ranks, reads what they print, and ends them."""

import os
import textwrap
import time

import pytest

from benchmarks import ranks


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes a module with this code, for the ranks to run."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    def make(code):
        (tmp_path / "on_a_rank.py").write_text(textwrap.dedent(code))
        return "on_a_rank"

    return make


def test_what_libraries_print_is_no_result(module):
    code = """
        import os
        from benchmarks import ranks, timing
        print("{'a': a dict of a library}")
        print('{"rows": 0}')
        print("tick tock")
        with timing._bar(2, "work") as bar:
            bar.update()
            print("no end of line", end="")
            bar.update()
            print("no end of line", end="")
        spec, device = ranks.join()
        ranks.leave([spec, os.environ.get("PYZERO_NUM_THREADS")])
        print("{}")
    """
    assert ranks.launch(module(code), 1, {"a": 1}) == [{"a": 1}, None]


def test_all_ranks_have_one_thread(module, monkeypatch):
    monkeypatch.setenv("PYZERO_NUM_THREADS", "2")
    code = """
        import os, torch
        from benchmarks import ranks
        ranks.join()
        ranks.leave([torch.get_num_threads(), os.environ.get("PYZERO_NUM_THREADS")])
    """
    assert ranks.launch(module(code), 1, {}) == [1, None]


def test_a_killed_rank_is_told(module):
    with pytest.raises(AssertionError, match="Signal 9"):
        ranks.launch(module("import os; os.kill(os.getpid(), 9)"), 1, {})


def test_an_error_of_a_rank_is_told(module):
    with pytest.raises(AssertionError, match="KeyError: 'HOME'"):
        ranks.launch(module("raise KeyError('HOME')"), 1, {})


def test_too_long_is_told(module, monkeypatch):
    monkeypatch.setattr(ranks, "_TIMEOUT_S", 8)
    with pytest.raises(AssertionError, match="took more than 8 s"):
        ranks.launch(module("import time; time.sleep(60)"), 1, {})


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_ctrl_c_ends_the_ranks(module, monkeypatch, tmp_path):
    """Also if it reaches this process alone, as with `kill -INT`."""

    def interrupted(process, what):
        assert process.stdout.readline() == "begun\n"
        raise KeyboardInterrupt

    monkeypatch.setattr(ranks, "_read", interrupted)
    code = f"""
        import os, pathlib, time
        pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
        print("begun", flush=True)
        time.sleep(60)
    """
    with pytest.raises(KeyboardInterrupt):
        ranks.launch(module(code), 1, {})
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(pid)
