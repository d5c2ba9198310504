from pathlib import Path

import pytest

from cogview.checkpoints.registry import cache_folder
from cogview.cli.main import main
from cogview.errors import InputError
from cogview.process_variables import is_first_process, number_variable, rank_and_world_size, threads_variable


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """Remove the variables of a launcher."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "COGVIEW_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_rank_and_world_size_are_those_of_one_process_without_a_launcher():
    assert rank_and_world_size() == (0, 1)
    assert is_first_process()
    assert number_variable("LOCAL_RANK", 0) == 0
    assert threads_variable() is None


def test_rank_and_world_size_read_the_variables_of_a_launcher(monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "OMP_NUM_THREADS": "4,2"}.items():
        monkeypatch.setenv(name, value)
    assert rank_and_world_size() == (3, 4)
    assert not is_first_process()
    assert number_variable("LOCAL_RANK", 0) == 1
    assert threads_variable() == 4


@pytest.mark.parametrize("value", ["abc", "", "-1", "1.5", "²", "9" * 5000])
@pytest.mark.parametrize(
    "read", [rank_and_world_size, is_first_process, threads_variable, lambda: number_variable("LOCAL_RANK", 0)]
)
def test_number_variables_refuse_what_is_no_number(monkeypatch, value, read):
    for name in ("RANK", "LOCAL_RANK", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"^(RANK|LOCAL_RANK|OMP_NUM_THREADS) ") as error:
        read()
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("name", ["COGVIEW_HOME", "XDG_CACHE_HOME"])
def test_cache_folder_names_a_variable_whose_home_folder_is_missing(monkeypatch, name):
    monkeypatch.setenv(name, "~nobody-of-this-name/models")
    with pytest.raises(InputError, match=f"^{name} is '~nobody-of-this-name/models': there is no such home folder"):
        cache_folder()
    monkeypatch.setenv(name, "")
    assert cache_folder() == Path("~/.cache/cogview").expanduser()


def test_doctor_reports_a_wrong_world_size_in_one_line(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "abc")
    assert main(["doctor", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert 'RANK "0" and WORLD_SIZE "abc" must be whole numbers' in captured.out
    assert captured.err == ""
