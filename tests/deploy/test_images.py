"""The images' recipes: everything they copy is there, and nothing is fetched that has no version."""

import re
from pathlib import Path

import pytest

from tests.deploy.composition import COMPOSE, services
from tests.deploy.images import RECIPES, instructions
from tests.deploy.test_compose import SECRETS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_what_is_copied_exists_and_reaches_the_builder(recipe: Path) -> None:
    ignore = recipe.with_name(recipe.name + ".dockerignore").read_text().splitlines()
    admitted = {line[1:] for line in ignore if line.startswith("!")}
    copied = 0
    for name, rest in instructions(recipe):
        if name != "COPY" or rest.startswith("--from"):
            continue
        for source in rest.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source.split("/")[0] in admitted, f"{source} is ignored"
            copied += 1
    assert copied > 5


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_last_stage_runs_as_nobody_in_particular(recipe: Path) -> None:
    written = instructions(recipe)
    last = max(index for index, (name, _) in enumerate(written) if name == "FROM")
    users = [rest for name, rest in written[last:] if name == "USER"]
    assert users == ["10001:10001"]
    kinds = [name for name, _ in written[last:]]
    assert kinds.index("USER") > max(i for i, name in enumerate(kinds) if name in {"COPY", "RUN"})


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_all_code_that_is_copied_is_compiled(recipe: Path) -> None:
    written = instructions(recipe)
    (compiled,) = [rest for name, rest in written if name == "RUN" and "compileall" in rest]
    last = max(index for index, (name, _) in enumerate(written) if name == "FROM")
    copied = {
        source.split("/")[0]
        for name, rest in written[last:]
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
        if (ROOT / source.split("/")[0]).is_dir()
    }
    assert set(compiled.split()[4:]) == copied


def test_every_image_has_a_version() -> None:
    bases = [
        rest.split()[0]
        for recipe in RECIPES
        for name, rest in instructions(recipe)
        if name == "FROM"
    ]
    used = [service["image"] for service in services(SECRETS).values() if "build" not in service]
    assert len(bases) >= 5
    assert len(used) == 4
    for image in bases + used:
        tag = image.partition(":")[2]
        assert re.search(r"\d+\.\d+\.\d+|\d{4}-\d\d-\d\d|^\d+\.\d+-", tag), f"{image} is not pinned"


def test_packages_are_installed_under_the_versions_that_were_tried_together() -> None:
    for recipe in RECIPES:
        for name, rest in instructions(recipe):
            if name == "RUN" and "pip install" in rest:
                for command in rest.split("&&"):
                    if "pip install" in command:
                        assert "constraints.txt" in command or "==" in command, command


def test_the_apis_image_has_no_torch() -> None:
    recipe = next(path for path in RECIPES if path.stem == "api")
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", recipe.read_text())
    assert extras == "api,postgresql,s3,traces"


def test_services_are_built_by_recipes_that_exist() -> None:
    for service in services(SECRETS).values():
        if build := service.get("build"):
            context = (COMPOSE.parent / build["context"]).resolve()
            assert context == ROOT
            assert (context / build["dockerfile"]) in RECIPES
