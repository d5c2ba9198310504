"""Records of the steps of a recipe: what has changed since."""

from cogview.training.step_records import changes_of


def test_changes_of_names_the_keys_that_differ():
    stored = {"training": {"steps": 10, "tasks": {"generate": 1}}, "run": {"keep": 2}}
    given = {"training": {"steps": 20, "tasks": {"generate": 1}}, "run": {"keep": 3}}
    assert changes_of(stored, given, free=("run",)) == ["training.steps 10 -> 20"]


def test_changes_of_shortens_long_lists():
    words = [f"词{number}" for number in range(6_000)]
    (change,) = changes_of({"lora": {"words": ["词0"]}}, {"lora": {"words": words}})
    assert change.startswith("lora.words ['词0'] -> ['词0', '词1', ")
    assert change.endswith(" and 5992 more]")
    assert len(change) < 200
