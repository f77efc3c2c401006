import nbformat
import pytest

from ngcore.study.profiles import (
    ProfileError,
    declared_parameters,
    find_notebooks,
    load_profile,
    parameters_for,
)
from ngcore.study.runs import ROOT
from ngcore.tasks.rows import of_dataset

PARAMETERS = 'profile = "quick"\nepochs: int = 20\nseeds = [\n    0,\n    1,\n]\n'


def write_notebook(path, *tagged):
    cells = [nbformat.v4.new_markdown_cell("# Title")]
    cells += [nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]}) for source in tagged]
    cells.append(nbformat.v4.new_code_cell("elsewhere = 3"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


@pytest.fixture
def profiles(tmp_path):
    """An empty directory of profiles, below two notebooks."""
    for name in ("01_second", "00_first"):
        write_notebook(tmp_path / f"{name}.ipynb", PARAMETERS)
    (tmp_path / "profiles").mkdir()
    return tmp_path / "profiles"


def test_values_reach_their_notebook_and_every_notebook_learns_the_profile(profiles):
    (profiles / "tiny.yaml").write_text('"01": {epochs: 2, seeds: [0]}\n')
    profile = load_profile("tiny", profiles)
    assert profile == {"00": {"profile": "tiny"}, "01": {"epochs": 2, "seeds": [0], "profile": "tiny"}}
    assert parameters_for(profiles.parent / "01_second.ipynb", profile) == profile["01"]


def test_unknown_profile_lists_those_that_exist(profiles):
    (profiles / "quick.yaml").write_text("{}")
    (profiles / "cpu.yaml").write_text("{}")
    with pytest.raises(ProfileError, match=r"unknown profile 'gpu'.*: cpu, quick"):
        load_profile("gpu", profiles)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"07": {}', r"no notebook '07'.*\"00\", \"01\""),
        ("01: {}", r"no notebook 1; numbers, in quotes"),  # YAML reads an integer
        ("- a", "must map notebook numbers"),
        ("", "must map notebook numbers"),
        ('"01": 3', '"01" must map parameters'),
        ('"01":', '"01" must map parameters'),
        ('"01": {epochs: [}', "not valid YAML"),
        ('"01": {seeds: {0: 2}}', r"seeds: put keys in quotes .*\[0\]"),
        ('"01": {seeds: {"mnist": {64: 2}}}', r"seeds: put keys in quotes .*\[64\]"),
    ],
)
def test_bad_files_are_named(profiles, text, message):
    (profiles / "bad.yaml").write_text(text)
    with pytest.raises(ProfileError, match=message) as error:
        load_profile("bad", profiles)
    assert "bad.yaml" in str(error.value)


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "notebooks" / "profiles").glob("*.yaml"))])
def test_the_profiles_of_the_study_fit_its_notebooks(name):
    notebooks = ROOT / "notebooks"
    profile = load_profile(name, notebooks / "profiles")
    for notebook in find_notebooks(notebooks).values():
        assert parameters_for(notebook, profile)["profile"] == name


def values_of(number, name):
    """A notebook's parameters in a profile: those of its own cell, and what the profile replaces."""
    own = declared_parameters(find_notebooks(ROOT / "notebooks")[number])
    return own | load_profile(name, ROOT / "notebooks" / "profiles")[number]


@pytest.mark.parametrize("name", ["smoke", "quick", "cpu", "paper"])
def test_ablations_have_the_scale_of_the_tables_whose_runs_they_reuse(name):
    inrs, cnns, ablations = (values_of(number, name) for number in ("01", "03", "05"))
    long = {**ablations, **ablations["long"]}  # of table 7 and figure 4
    for parameter in ("train_size", "validation_size", "test_size", "batch", "warmup", "decay", "dropout", "augment"):
        assert long[parameter] == of_dataset(inrs[parameter], "mnist"), parameter
    if name != "smoke":  # whose long runs are two epochs, so that there is a curve
        assert long["epochs"] == of_dataset(inrs["epochs"], "mnist")
    for parameter in ("inr_steps", "inr_learning_rate", "precision"):
        assert long[parameter] == of_dataset(inrs[parameter], "mnist"), parameter
    assert set(ablations["compiled"]) == set(inrs["compiled"])
    for parameter in ("wild_park", "weight_decay", "decay"):
        assert ablations[parameter] == cnns[parameter], parameter
    for parameter in ("epochs", "batch", "warmup"):
        assert ablations[f"park_{parameter}"] == cnns[parameter]["cifar10_wild_park"], parameter
    assert ablations["learning_rate"].items() <= cnns["learning_rate"].items()


def test_a_misspelt_parameter_is_an_error(profiles):
    (profiles / "tiny.yaml").write_text('"01": {epoch: 2}\n')
    profile = load_profile("tiny", profiles)
    message = r"01_second\.ipynb has no parameter epoch; .* epochs, profile, seeds"
    with pytest.raises(ProfileError, match=message):
        parameters_for(profiles.parent / "01_second.ipynb", profile)


def test_declared_parameters_are_those_of_the_tagged_cell(tmp_path):
    write_notebook(tmp_path / "00_a.ipynb", PARAMETERS)
    assert declared_parameters(tmp_path / "00_a.ipynb") == {"profile": "quick", "epochs": 20, "seeds": [0, 1]}


@pytest.mark.parametrize("tagged", [(), (PARAMETERS, PARAMETERS)])
def test_a_notebook_needs_exactly_one_parameters_cell(tmp_path, tagged):
    write_notebook(tmp_path / "00_a.ipynb", *tagged)
    with pytest.raises(ProfileError, match=rf"00_a\.ipynb has {len(tagged)} cells tagged"):
        declared_parameters(tmp_path / "00_a.ipynb")


@pytest.mark.parametrize("cell", ["epochs = 2 * 10", "import os", "a.b = 1"])
def test_a_parameter_is_a_literal(tmp_path, cell):
    write_notebook(tmp_path / "00_a.ipynb", "x = 1\n" + cell)
    with pytest.raises(ProfileError, match=r"00_a\.ipynb, parameters cell, line 2: a parameter is a name"):
        declared_parameters(tmp_path / "00_a.ipynb")


def test_a_truncated_notebook_is_named(tmp_path):
    (tmp_path / "00_a.ipynb").write_text('{"cells": [')
    with pytest.raises(ProfileError, match=r"00_a\.ipynb is no notebook"):
        declared_parameters(tmp_path / "00_a.ipynb")


def test_notebooks_are_found_in_order_and_two_of_one_number_refused(profiles):
    directory = profiles.parent
    (directory / "draft.ipynb").write_text("{}")
    assert list(find_notebooks(directory)) == ["00", "01"]
    write_notebook(directory / "01_again.ipynb", PARAMETERS)
    with pytest.raises(ProfileError, match=r"01_again\.ipynb and 01_second\.ipynb"):
        find_notebooks(directory)
