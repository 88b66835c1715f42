import ast
import inspect
from itertools import combinations, pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neural_mri.backing import settings as module
from neural_mri.backing.settings import PREFIX, InvalidSettings, Settings, load_settings


@pytest.mark.parametrize(
    ("slip", "meant"),
    [
        ("PROT", "PORT"),
        ("USER_MAX_JOB", "USER_MAX_JOBS"),
        ("REDISURL", "REDIS_URL"),
        ("LEASE_SECODNS", "LEASE_SECONDS"),
        ("PINNED_MODELSS", "PINNED_MODELS"),
    ],
)
def test_a_slip_of_the_pen_is_refused_with_what_was_meant(slip: str, meant: str) -> None:
    with pytest.raises(
        InvalidSettings, match=rf"^NEURAL_MRI_{slip} is not .*; NEURAL_MRI_{meant} is"
    ):
        load_settings({PREFIX + slip: "1"})


def test_what_only_a_newer_release_knows_is_left_alone_and_named() -> None:
    environment = {"NEURAL_MRI_TELESCOPE_COLOUR": "blue", "NEURAL_MRI_PORT": "81", "PATH": "/bin"}
    assert load_settings(environment).port == 81
    assert module.unknown(environment) == ["NEURAL_MRI_TELESCOPE_COLOUR"]


def test_no_setting_is_another_ones_slip() -> None:
    names = [field.name for field in msgspec.structs.fields(Settings)]
    near = [pair for pair in combinations(names, 2) if module._differ_by_a_slip(*pair)]
    assert near == [("host", "port")], "where they are both known neither is taken for the other"


def test_proxies_are_addresses_and_networks() -> None:
    said = load_settings({"NEURAL_MRI_TRUSTED_PROXIES": "10.0.0.0/8, 192.0.2.7,fd00::/8"})
    assert [str(network) for network in said.proxies] == ["10.0.0.0/8", "192.0.2.7/32", "fd00::/8"]
    for wrong in ("ingress", "10.0.0.1/8", "10.0.0.0/40"):
        with pytest.raises(InvalidSettings, match=f"NEURAL_MRI_TRUSTED_PROXIES: .*{wrong}"):
            load_settings({"NEURAL_MRI_TRUSTED_PROXIES": wrong})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("PORT", "70000", "<= 65535"),
        ("PORT", "many", "int"),
        ("LEASE_SECONDS", "0", "> 0"),
        ("LOG_FORMAT", "xml", "enum value"),
        ("DTYPE", "int8", "enum value"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_name_and_what_it_needs(
    name: str, value: str, expected: str
) -> None:
    with pytest.raises(InvalidSettings, match=rf"NEURAL_MRI_{name} is '{value}'.*{expected}"):
        load_settings({PREFIX + name: value})


def test_other_peoples_variables_are_none_of_ours() -> None:
    assert load_settings({"PATH": "/bin", "NEURAL_NET": "x"}) == Settings()


@given(
    st.builds(
        Settings,
        data_dir=st.sampled_from([Path("/var/lib/x y"), Path("~/.neural-mri")]),
        port=st.integers(1, 65535),
        lease_seconds=st.floats(0.001, 1e6),
        max_queued_jobs=st.integers(1, 10**9),
        pinned_models=st.text("abc,-/", max_size=20),
        redis_url=st.sampled_from(["", "redis://u:p@h:6379/1"]),
        log_format=st.sampled_from(["json", "console"]),
    )
)
def test_a_child_process_reads_the_very_settings_its_parent_has(settings: Settings) -> None:
    assert load_settings(settings.environment()) == settings


def test_every_setting_says_what_it_is_for() -> None:
    tree = ast.parse(inspect.getsource(module))
    body = next(
        node.body
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "Settings"
    )
    documented = {
        statement.target.id
        for statement, following in pairwise(body)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
    }
    assert documented == {field.name for field in msgspec.structs.fields(Settings)}


def test_every_setting_is_listed_for_whoever_runs_the_service() -> None:
    listed = (Path(__file__).parents[2] / "docs/settings.md").read_text()
    for field in msgspec.structs.fields(Settings):
        row = f"| `{PREFIX}{field.name.upper()}` |"
        assert row in listed, f"docs/settings.md has no row that begins {row}"


def test_a_password_in_a_url_is_not_shown() -> None:
    settings = Settings(database_url="postgresql://ada:lovelace@db/nmri")
    assert "lovelace" not in repr(settings)
    assert "***@db/nmri" in repr(settings)
    assert module.without_credentials("https://hf_token@mirror/x a@b") == "https://***@mirror/x a@b"
    # Some clients take a password as it is, with whatever is in it.
    assert module.without_credentials("redis://:love@lace@valkey/0") == "redis://***@valkey/0"


def test_everything_lives_in_the_data_folder_unless_told_otherwise(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    assert settings.effective_database_url == f"sqlite:///{tmp_path}/neural-mri.db"
    assert settings.effective_redis_url == f"unix://{tmp_path}/valkey.sock"
    assert {settings.models_dir.parent, settings.store_dir.parent} == {tmp_path}


def test_pinned_models_are_separated_by_commas() -> None:
    assert Settings(pinned_models=" a, b ,,").pinned == ("a", "b")


def test_sources_of_models_are_read_by_name() -> None:
    said = "a=folder:/data/a,b=hf:acme/b@v2"
    settings = load_settings({"NEURAL_MRI_MODEL_SOURCES": said})
    assert settings.sources == {"a": "folder:/data/a", "b": "hf:acme/b@v2"}
    assert Settings().sources == {}
    for wrong in ("a", "a=", "=hf:acme/b", "a=hf:acme/b,", "a=b c"):
        with pytest.raises(InvalidSettings, match="NEURAL_MRI_MODEL_SOURCES"):
            load_settings({"NEURAL_MRI_MODEL_SOURCES": wrong})
