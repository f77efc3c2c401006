"""The order of worth: which of several notebooks' runs are executed first, and what is published when time ends."""

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngcore import tasks
from ngcore.study.execution import Execution, OutOfTime
from ngcore.study.executor import RunsFailed
from ngcore.study.plans import Plan, carry_out, carry_out_by_worth, rank
from ngcore.study.profiles import ProfileError, declared_parameters, load_training, plan_notebooks
from ngcore.study.runs import ROOT


@dataclass(frozen=True)
class Config:
    method: str
    seed: int
    task: str = "t"


def record(config):
    name = f"{config.method}{config.seed}"
    own = {"task": config.task, "dataset": "d", "method": config.method}
    return {"hash": name, "config": own, "environment": {"commit": "abc"}}


def conversation(*questions):
    """A plan that asks these questions one after the other and returns all answers."""
    answers = []
    for configs in questions:
        answers += yield list(configs)
    return answers


CONFIGS = [Config(method, seed) for method in "abc" for seed in range(3)]
QUESTIONS = st.lists(st.lists(st.sampled_from(CONFIGS), max_size=4), max_size=3)
ENTRIES = st.lists(
    st.fixed_dictionaries({}, optional={"method": st.lists(st.sampled_from("abc")), "seed": st.integers(0, 2)}),
    max_size=4,
)


@given(st.dictionaries(st.sampled_from(["01", "02", "03"]), QUESTIONS), ENTRIES)
def test_what_waits_is_never_worth_more_than_what_is_executed(questions, worth):
    """Each plan gets what it gets alone; every config is executed once; the order is held against the definition."""
    done, ended, order = [], {}, []

    def waiting():
        """(rank, notebook, config) of everything that some plan has asked for and is not done: a plan asks its first
        question that is not all done."""
        for notebook, own in questions.items():
            asked = next((q for q in own if any(config not in done for config in q)), [])
            yield from ((rank(worth, notebook, c), notebook, c) for c in asked if c not in done)

    def execute_all(notebook, configs):
        least = min(key for key, _, _ in waiting())
        order.append(least)
        assert {rank(worth, notebook, config) for config in configs} == {least}
        assert not set(configs) & set(done)
        assert len(set(configs)) == len(configs)
        done.extend(configs)
        return [record(config) for config in configs]

    def note(notebook, found, complete):
        if complete:
            ended[notebook] = found

    carry_out_by_worth({n: conversation(*own) for n, own in questions.items()}, worth, execute_all, note)
    alone = {n: carry_out(conversation(*own), lambda c: list(map(record, c))) for n, own in questions.items()}
    assert ended == alone
    assert len(done) == len(set(done)) == len(set(itertools.chain(*itertools.chain(*questions.values()))))


def test_an_entry_fits_configs_with_all_that_it_names():
    worth = [{"notebook": "02", "method": "a"}, {"method": ["a", "b"], "seed": 0}, {"probes": 4}]
    assert rank(worth, "02", Config("a", 1)) == 0
    assert rank(worth, "01", Config("a", 0)) == rank(worth, "01", Config("b", 0)) == 1
    assert rank(worth, "01", Config("a", 1)) == rank(worth, "01", Config("c", 0)) == 3  # no config here has probes


def test_a_failure_stops_no_run_but_those_that_need_it():
    executed, ended = [], []

    def execute_all(notebook, configs):
        executed.extend(configs)
        if Config("a", 0) in configs:
            raise RunsFailed("diverged", {config: record(config) for config in configs if config != Config("a", 0)})
        return list(map(record, configs))

    plans = {
        "01": conversation([Config("a", 0), Config("a", 1)], [Config("c", 0)]),
        "02": conversation([Config("a", 1), Config("b", 0)], [Config("b", 1)]),
    }
    with pytest.raises(RunsFailed, match="diverged"):
        carry_out_by_worth(plans, [{"method": "a"}], execute_all, lambda n, f, complete: complete and ended.append(n))
    assert executed == [Config("a", 0), Config("a", 1), Config("b", 0), Config("b", 1)]
    assert ended == ["02"]


def test_when_time_ends_what_is_finished_is_published(tmp_path, monkeypatch):
    """Beside what is there already, for it may be of runs that this call did not come to."""
    monkeypatch.setenv("NGCORE_OUTPUT", str(tmp_path))
    plan = Plan(lambda parameters: conversation([Config("a", 0), Config("b", 0)], [Config("c", 0)]), ("t",))
    monkeypatch.setattr(tasks, "PLANS", {"01": plan})
    directory = tmp_path / "data" / "results" / "p"

    def late(configs, execution, executor):
        finished = {config: record(config) for config in configs if config.method != "b"}
        if len(finished) < len(configs):
            raise OutOfTime("late", finished)
        return list(finished.values())

    monkeypatch.setattr(tasks, "execute_all", late)
    notebooks = {"01": {"profile": "p", "train": True}}
    with pytest.raises(OutOfTime):
        tasks.train_all(notebooks, (), Execution())
    assert [path.stem for path in directory.glob("*.json")] == ["a0"]
    with pytest.raises(OutOfTime):
        tasks.train_all(notebooks, ({"method": "b"},), Execution())
    assert [path.stem for path in directory.glob("*.json")] == ["a0"]
    monkeypatch.setattr(tasks, "execute_all", lambda configs, *_: list(map(record, configs)))
    tasks.train_all(notebooks, (), Execution())
    assert sorted(path.stem for path in directory.glob("*.json")) == ["a0", "b0", "c0"]


def first_questions(profile):
    """(notebook, config) of all that a profile's plans ask for at first."""
    for notebook, changes in plan_notebooks(profile, None, ROOT / "notebooks").items():
        plan = tasks.PLANS.get(notebook.name[:2])
        if plan is not None:
            parameters = declared_parameters(notebook) | changes
            yield from ((notebook.name[:2], config) for config in next(plan.runs(parameters)))


@pytest.mark.parametrize("profile", ["paper", "smoke"])
def test_no_entry_of_a_profile_is_in_vain(profile):
    worth = load_training(profile, ROOT / "notebooks" / "profiles").worth
    found = {rank(worth, *asked) for asked in first_questions(profile)}
    later = {i for i, entry in enumerate(worth) if entry.keys() <= {"notebook"}}  # all else that a notebook asks for
    assert set(range(len(worth))) <= found | later


def test_the_paper_profile_begins_with_the_rows_that_say_most():
    worth = load_training("paper", ROOT / "notebooks" / "profiles").worth
    asked = sorted(first_questions("paper"), key=lambda pair: rank(worth, *pair))
    first = [(n, c.dataset, c.method, c.probes, c.seed, c.recipe) for n, c in asked[:4]]
    for some, probes in ((first[:2], 64), (first[2:], 0)):
        assert set(some) == {("01", "mnist", method, probes, 0, "paper") for method in ("NG-GNN", "NG-T")}
    for config in (c for _, c in asked[:20]):
        assert (config.seed, config.dataset) == (0, "mnist")


def test_mistakes_in_the_section_are_named(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {worth: [{seed: 0}], speed: high}\n")
    with pytest.raises(ProfileError, match=r"a\.yaml: 'train' holds .*speed"):
        load_training("a", tmp_path)
    (tmp_path / "b.yaml").write_text("train: {worth: [5]}\n")
    with pytest.raises(ProfileError, match=r"b\.yaml: 'train' holds"):
        load_training("b", tmp_path)
    with pytest.raises(ValueError, match=r"worth: no run has sede; there are .*seed"):
        tasks.train_all({}, ({"sede": 0},), Execution())
